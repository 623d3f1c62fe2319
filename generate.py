"""Write text with a trained model:  python generate.py <checkpoint> --prompt "Once upon a time"

<checkpoint> is a run's folder (its newest checkpoint), one of its step-* folders, or a model of Hugging Face's that can
be imported.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from config import GenerationConfig, parse_arguments
from errors import ConfigError, complain, exit_code_of

if TYPE_CHECKING:
    from model import GPT
    from tokenizer import Tokenizer


@dataclass
class Arguments(GenerationConfig):
    """Continue a prompt, which begins a document, until the model writes end-of-text.

    A prompt longer than the model's context keeps its last tokens, and says so.
    """

    # a run's folder, one of its step-* folders, or a model of Hugging Face's that can be imported
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = tyro.MISSING
    int8: bool = False  # weights rounded to 8 bits: one text faster on a CPU, and it differs a little
    # text to continue; @FILE reads a file, - standard input, without the last line's end; empty starts a new document
    prompt: str = ""
    explain: str = ""  # also write a page to this .html: each token's probability, attention, what each layer expects

    def validate(self) -> None:
        super().validate()
        if self.explain and not self.explain.endswith((".html", ".htm")):  # it would replace a file of one's own
            raise ConfigError(f"--explain {self.explain} is not an .html file; name the page to write")
        if self.explain and (self.num_samples > 1 or self.int8):
            raise ConfigError(
                "--explain is of one text, by the weights as they are; leave --num_samples and --int8 out"
            )


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if len(words) > 1 and not any(word.startswith("-") for word in words[:2]):
        typed = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
        raise ConfigError(f"{words[1]!r} is no option; a text is given as --prompt {shlex.quote(typed)}")
    arguments = parse_arguments(Arguments, argv)
    arguments.validate()
    if arguments.temperature == 0 and arguments.num_samples > 1:
        complain(f"--temperature 0 always takes the likeliest token: the {arguments.num_samples} texts will be equal")

    prompt = read_prompt(arguments.prompt)

    import torch  # after parsing: --help and mistakes are answered at once

    from checkpoint import load_model
    from decoding import decode_step
    from hardware import best_dtype, default_device
    from sampling import TextStream, encode_prompt, generate_ids

    device = default_device()
    dtype = best_dtype(device)
    model, tokenizer, config, step = load_model(arguments.checkpoint, device, dtype)
    ids = encode_prompt(prompt, tokenizer)
    if len(ids) > model.config.max_length:
        if arguments.explain:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens with end-of-text; --explain is of one context, at most "
                f"{model.config.max_length}: shorten it"
            )
        print(f"the prompt has {len(ids)} tokens; the model sees its last {model.config.max_length}", file=sys.stderr)

    # In fp16 as in training, with the residual stream, which may pass its largest number, in fp32.
    with torch.inference_mode(), torch.autocast(device.type, torch.float16, enabled=dtype == torch.float16):
        decode = decode_step(model, arguments.num_samples, arguments.int8)
        steps = generate_ids(model, ids, tokenizer, arguments, decode=decode)
        if arguments.num_samples == 1:  # show it as it grows
            print(prompt, end="", flush=True)
            stream, written = TextStream(tokenizer), []
            for (token_id,) in steps:
                written.append(token_id)
                if token_id != tokenizer.eot_id:
                    print(stream.add(token_id), end="", flush=True)
            print(stream.end())
            if arguments.explain:
                title = f"{config.train.run_name} at step {step:,}"
                show_inside(model, tokenizer, ids, written, Path(arguments.explain).expanduser(), title)
        else:
            texts = list(zip(*steps, strict=True))  # one tuple of ids a sample
            for number, text in enumerate(texts, start=1):
                print(f"--- sample {number} of {len(texts)}")
                print(prompt + tokenizer.decode(i for i in text if i != tokenizer.eot_id))
    return 0


def show_inside(model: GPT, tokenizer: Tokenizer, prompt: list[int], text: list[int], page: Path, title: str) -> None:
    """Write a page of what the model computed for this text; in a terminal, print the text coloured by probability."""
    from explain import MAP_TOKENS, colour_text, explain, page_values
    from pages import write_page

    ids = [*prompt, *text][: model.config.max_length]
    explanation = explain(model, ids)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # https://no-color.org
        print(f"\n{colour_text(explanation, tokenizer)}")
    notes = []
    if len(ids) < len(prompt) + len(text):
        notes.append(
            f"Shown are the first {len(ids)} of {len(prompt) + len(text)} tokens, which fill the model's context."
        )
    if len(ids) > MAP_TOKENS:
        notes.append(f"Attention is shown among the first {MAP_TOKENS} of {len(ids)} tokens.")
    write_page(page, "explain.html", title=title, notes=notes, values=page_values(explanation, tokenizer, len(prompt)))
    for note in notes:
        complain(note)
    complain(f"written to {page}")


def read_prompt(prompt: str) -> str:
    """The prompt itself, the file after an @, or standard input for -, but for the newline that ends their last line.
    A line may end as on Windows.

    Raises ConfigError for what cannot be read.
    """
    if prompt != "-" and not prompt.startswith("@"):
        return prompt
    try:
        content = sys.stdin.buffer.read() if prompt == "-" else Path(prompt[1:]).expanduser().read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except FileNotFoundError:
        raise ConfigError(
            f"--prompt {prompt}: there is no file {prompt[1:]!r}, which the @ asks for; mend the path"
        ) from None
    except (AttributeError, OSError, UnicodeDecodeError) as error:  # AttributeError: without standard input
        what = "standard input" if prompt == "-" else "the file"
        raise ConfigError(f"--prompt {prompt}: {what} cannot be read as text ({error})") from None


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
