"""lm_eval on a checkpoint:  python scripts/lm_eval_adapter.py <checkpoint> --tasks triviaqa --limit 100

For the tasks that evals.py lacks. Needs pip install lm_eval==0.4.13, whose requests are answered here one at a time,
without a cache: slowly, and independently of scoring.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from any folder

from checkpoint import load_model
from config import GenerationConfig
from errors import ConfigError, exit_code_of
from hardware import default_device
from sampling import encode_prompt, generate_text


def checkpoint_lm(checkpoint: str) -> Any:
    """A checkpoint in fp32 as an LM of lm_eval. Texts begin with end-of-text, as in training. Raises ConfigError."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        raise ConfigError("this needs lm_eval; pip install lm_eval==0.4.13") from None

    class CheckpointLM(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.text, _, _ = load_model(checkpoint, default_device())
            self.max_length = self.model.config.max_length

        @property
        def eot_token_id(self) -> int:
            return self.text.eot_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode_prompt(string, self.text)[1 if add_special_tokens is False else 0 :]

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            answers = []
            for _, context, continuation in requests:
                ids = torch.tensor([(context + continuation)[-self.max_length - 1 :]], device=self.model.device)
                log_p = self.model(ids[:, :-1])[0, -len(continuation) :].float().log_softmax(dim=1)
                wanted = ids[0, -len(continuation) :]
                answers.append((log_p.gather(1, wanted[:, None]).sum().item(), bool((log_p.argmax(1) == wanted).all())))
            return answers

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1)
                parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
                sums.append(sum(value for value, _ in parts))
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts = []
            for prompt, options in (request.args for request in requests):
                greedy = GenerationConfig(max_tokens=options.get("max_gen_toks", 256), temperature=0)
                text = generate_text(self.model, prompt, self.text, greedy)[0]
                stops = [at for stop in options.get("until", []) if (at := text.find(stop)) >= 0]
                texts.append(text[: min(stops, default=len(text))])
            return texts

    return CheckpointLM()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder or one of its step-* folders")
    parser.add_argument("--tasks", required=True, help="names of lm_eval's tasks, with commas between them")
    parser.add_argument("--limit", type=int, help="only the first so many documents of each task")
    arguments = parser.parse_args()
    model = checkpoint_lm(arguments.checkpoint)
    import lm_eval.utils

    results = lm_eval.simple_evaluate(model, tasks=arguments.tasks.split(","), limit=arguments.limit)
    print(lm_eval.utils.make_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
