"""train.py with one thing changed that no option changes:  python bench/variants.py NAME[,NAME] [options of train.py]

For bench/ablate.py, whose changes may begin with --variant NAME. Of two that replace the same thing, one is lost. What
pays and can be exported moves into the code and leaves this file; what does not pay stays, so that its figure can be
measured again. Where one does not compile, add --train.no_compile.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optim
from model import GPT, Attention, Block, in_parts
from prepare_data import IGNORED, Batch, DatasetPrep

STEP = [0]  # optimizer steps done, for schedules


def count_steps() -> None:
    plain = optim.set_learning_rates
    if plain.__name__ == "counting":  # for another variant already
        return

    def counting(optimizers: Any, factor: float) -> None:
        STEP[0] += 1
        plain(optimizers, factor)

    optim.set_learning_rates = counting


def after_init(change: Callable[[GPT], None]) -> None:
    """Change the fresh weights."""
    plain = GPT.init_weights

    @torch.no_grad()
    def init_weights(self: GPT) -> None:
        plain(self)
        change(self)

    GPT.init_weights = init_weights  # type: ignore[method-assign]


def blocks_of(gpt: GPT) -> list[Block]:
    return [*gpt.blocks]


# ---- initial values -----------------------------------------------------------------------------


def out_projections_small() -> None:
    """GPT-2's: standard deviation (2 L)^-1/2 of what the others have, instead of zero."""

    def change(gpt: GPT) -> None:
        for block in blocks_of(gpt):
            for out in (block.attention.wo, block.mlp.w_down):
                std = (2 * gpt.config.n_layers * out.in_features) ** -0.5
                nn.init.normal_(out.weight, std=std)

    after_init(change)


def qk_gain(gain: float) -> Callable[[], None]:
    """Queries and keys begin longer by this factor each: a sharper softmax."""

    def change(gpt: GPT) -> None:
        for block in blocks_of(gpt):
            block.attention.q_norm.weight.fill_(gain)
            block.attention.k_norm.weight.fill_(gain)

    return lambda: after_init(change)


# ---- the model ----------------------------------------------------------------------------------


def embedding_norm() -> None:
    """RMSNorm behind the embedding: it folds into the embedding's rows at export."""
    plain = nn.Embedding.forward
    nn.Embedding.forward = lambda self, ids: F.rms_norm(plain(self, ids), (self.embedding_dim,))  # type: ignore[method-assign]


def residual_scalars() -> None:
    """Each block scales the residual stream by a number that is learned: it folds into the projections at export."""
    plain_init, plain = Block.__init__, Block.forward

    def init(self: Block, c: Any) -> None:
        plain_init(self, c)
        self.norm_residual = nn.Parameter(torch.ones(1))  # "norm": it moves with the norms' rate

    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        return plain(self, x * self.norm_residual.to(x.dtype), *others)  # type: ignore[arg-type]

    Block.__init__, Block.forward = init, forward  # type: ignore[method-assign]


def first_input_shortcut() -> None:
    """x0 of modded-nanogpt: each block also gets the embedding again, by a learned share. Not exportable.

    With --train.no_compile: the first layer differs, so each would be compiled by itself.
    """
    plain_init, plain = Block.__init__, Block.forward
    first: list[Tensor] = []

    def init(self: Block, c: Any) -> None:
        plain_init(self, c)
        self.norm_shares = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self: Block, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, layer: int) -> Tensor:
        if layer == 0:
            first[:] = [x]
        shares = self.norm_shares.to(x.dtype)  # type: ignore[operator]
        return plain(self, shares[0] * x + shares[1] * first[0], cos, sin, cache, layer)

    Block.__init__, Block.forward = init, forward  # type: ignore[method-assign]


def documents_apart() -> None:
    """No token looks beyond its own document, in training and validation; with --train.no_compile, and data.tokenizer
    bpe, whose last id is end-of-text."""
    plain, plain_attention = GPT.forward, Attention.forward
    apart: list[Tensor | None] = [None]

    def forward(self: GPT, ids: Tensor, targets: Tensor | None = None, cache: Any = None, *a: Any, **k: Any) -> Tensor:
        of = (ids == self.config.vocab_size - 1).cumsum(dim=1)  # (B, T), which of the row's documents
        causal = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).tril()
        apart[0] = None if cache is not None else (of[:, None, :, None] == of[:, None, None, :]) & causal
        return plain(self, ids, targets, cache, *a, **k)

    def attend(
        self: Attention, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, layer: int, mask: Any = None
    ) -> Tensor:
        return plain_attention(self, x, cos, sin, cache, layer, apart[0])

    GPT.forward, Attention.forward = forward, attend  # type: ignore[method-assign]


# ---- the optimizer ------------------------------------------------------------------------------


def weights_averaged(decay: float) -> Callable[[], None]:
    """What is validated are not the weights but their running mean (EMA), of the last 1 / (1 - decay) steps or so."""

    def change() -> None:
        import runtime

        plain_build, plain_validation = optim.build_optimizers, runtime.validation_scores
        of: list[tuple[Tensor, Tensor]] = []  # weights and their means

        def build_optimizers(model: GPT, config: Any) -> list[torch.optim.Optimizer]:
            optimizers = plain_build(model, config)
            of[:] = [(p, p.detach().clone()) for p in model.parameters()]

            def average(*_: Any) -> None:
                n[0] += 1
                torch._foreach_lerp_([mean for _, mean in of], [p for p, _ in of], max(1 - decay, 1 / n[0]))

            n = [0]
            optimizers[-1].register_step_post_hook(torch.no_grad()(average))
            return optimizers

        def validation_scores(*a: Any) -> Any:
            with torch.no_grad():
                before = [p.clone() for p, _ in of]
                torch._foreach_copy_([p for p, _ in of], [mean for _, mean in of])
                scores = plain_validation(*a)
                torch._foreach_copy_([p for p, _ in of], before)
            return scores

        optim.build_optimizers, runtime.validation_scores = build_optimizers, validation_scores

    return change


def momentum_warmup(steps: int, low: float = 0.85) -> Callable[[], None]:
    """Muon's momentum rises from `low` over so many steps."""

    def change() -> None:
        count_steps()
        plain = optim.Muon.step

        def step(self: optim.Muon, closure: None = None) -> None:
            for group in self.param_groups:
                group["momentum"] = low + (0.95 - low) * min(1.0, STEP[0] / steps)
            plain(self)

        optim.Muon.step = step  # type: ignore[method-assign]

    return change


def momentum_of(value: float) -> Callable[[], None]:
    def change() -> None:
        plain = optim.Muon.step

        def step(self: optim.Muon, closure: None = None) -> None:
            for group in self.param_groups:
                group["momentum"] = value
            plain(self)

        optim.Muon.step = step  # type: ignore[method-assign]

    return change


def muon_by_kind() -> None:
    """The queries of all heads are a matrix, and so are the keys and the values."""
    plain = GPT.block_matrices

    def block_matrices(self: GPT) -> list[tuple[Tensor, tuple[int, ...]]]:
        c, found = self.config, []
        by_kind = tuple(n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads))
        for i, (weight, rows) in enumerate(plain(self)):  # four of each block, this one first
            found.append((weight, rows if i % 4 else by_kind))
        return found

    GPT.block_matrices = block_matrices  # type: ignore[method-assign]


def muon_unsplit() -> None:
    """Fused projections are orthogonalised whole."""
    plain = GPT.block_matrices
    GPT.block_matrices = lambda self: [(weight, (weight.size(0),)) for weight, _ in plain(self)]  # type: ignore[method-assign]


def muon_in_parts(up: int, down: int, out: int = 2**62) -> Callable[[], None]:
    """So many neighbouring rows of gate and up, of down and of attention's output are a matrix of their own."""
    plain = GPT.block_matrices

    def block_matrices(self: GPT) -> list[tuple[Tensor, tuple[int, ...]]]:
        c, found = self.config, []
        for i, (weight, rows) in enumerate(plain(self)):  # four of each block
            of_mlp = in_parts(c.d_ff, up) * (1 + (c.mlp == "swiglu"))
            found.append((weight, (rows, in_parts(c.d_model, out), of_mlp, in_parts(c.d_model, down))[i % 4]))
        return found

    def change() -> None:
        GPT.block_matrices = block_matrices  # type: ignore[method-assign]

    return change


def cautious_decay() -> None:
    """Decay only where the update goes towards zero as well (arXiv:2411.16085 for the idea)."""
    plain = optim.Muon.step

    def step(self: optim.Muon, closure: None = None) -> None:
        (group,) = self.param_groups
        decay, group["weight_decay"] = group["weight_decay"], 0.0
        before = [p.detach().clone() for p in group["params"]]
        plain(self)
        group["weight_decay"] = decay
        with torch.no_grad():
            for p, old in zip(group["params"], before, strict=True):
                p.sub_(old * ((old - p) * old > 0) * group["lr"] * decay)

    optim.Muon.step = step  # type: ignore[method-assign]


def normuon(beta: float = 0.95) -> None:
    """Each row of Muon's direction over the root of its recent mean square (NorMuon, arXiv:2510.05491); one process."""
    plain = optim.orthogonalize_together
    moments: dict[tuple[int, ...], tuple[Tensor, list[int]]] = {}

    def orthogonalize_together(matrices: tuple[Tensor, ...], processes: int) -> Tensor:
        direction = plain(matrices, processes).float()  # (n, rows, columns)
        squares = direction.square().mean(dim=2, keepdim=True)
        moment, n = moments.setdefault(tuple(direction.shape), (torch.zeros_like(squares), [0]))
        moment.lerp_(squares, 1 - beta)
        n[0] += 1
        scaled = direction * (moment / (1 - beta ** n[0]) + 1e-12).rsqrt()
        whole = scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # 0 while what is behind it is zero
        return scaled * (direction.norm(dim=(1, 2), keepdim=True) / whole)

    optim.orthogonalize_together = orthogonalize_together
    optim.NUMBERS_AT_ONCE = 2**62  # all of one shape, or others would find their moments


def other_polynomials(*polynomials: tuple[float, float, float]) -> Callable[[], None]:
    """Orthogonalised by other polynomials, as many as there are."""
    safe = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in polynomials[:-1]] + [polynomials[-1]]

    def change() -> None:
        optim._SAFE_POLYNOMIALS = safe

    return change


# Polar Express (arXiv:2505.16932; by its code, which gives optim.py's four for 0.005) for singular values from 0.001,
# 0.003 and 0.02.
FROM_1E_3 = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
FROM_3E_3 = (
    (8.219101105846397, -23.401956720536173, 17.1581989432209),
    (4.0048760591489705, -2.9223467745083918, 0.5491185267263443),
    (3.5235614361928396, -2.6398035290594577, 0.5272128341911072),
    (2.5115271663527308, -1.8524483560830058, 0.4388326355802106),
)
FROM_2E_2 = (
    (7.683060900379199, -21.87570834771988, 16.039161183674562),
    (3.2180804367864178, -2.4132861456261425, 0.5015390222317051),
    (2.2203684814920726, -1.5958909913675505, 0.41095148287740363),
)


def balanced_rows(*polynomials: tuple[float, float, float]) -> Callable[[], None]:
    """Rows scaled by their sums in the Gram matrix (AOL, arXiv:2208.03160; for Muon arXiv:2512.04632).

    The largest singular value is then at most 1 without the Frobenius norm, and the others come nearer to it.
    """

    def orthogonalize(x: Tensor) -> Tensor:
        wide = x.size(1) <= x.size(2)
        x = x if wide else x.mT
        x = (x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7)).to(optim.best_dtype(x.device))
        for step, (a, b, c) in enumerate(optim._SAFE_POLYNOMIALS):
            gram = x @ x.mT  # (n, r, r)
            if step == 0:
                scale = (gram.float().abs().sum(dim=2, keepdim=True) * 1.02 + 1e-12).rsqrt()  # (n, r, 1)
                x, gram = (x * scale).to(x.dtype), (gram * scale * scale.mT).to(x.dtype)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x if wide else x.mT).bfloat16()

    def change() -> None:
        other_polynomials(*polynomials)()
        optim.orthogonalize = orthogonalize

    return change


def torch_muon() -> None:
    """torch.optim.Muon in place of ours, on whole matrices, with the same update scale."""

    class Theirs(torch.optim.Muon):
        def __init__(self, matrices: Any, lr: float, momentum: float, weight_decay: float):
            weights = [p for p, _ in matrices]
            super().__init__(weights, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="original")

    optim.Muon = Theirs  # type: ignore[misc, assignment]


def adamw_blocks() -> None:
    """AdamW, with train.lr, in place of Muon; embedding, head and norms keep their own rates."""

    class InItsPlace(torch.optim.AdamW):
        def __init__(self, matrices: Any, lr: float, momentum: float, weight_decay: float):
            weights = [p for p, _ in matrices]
            super().__init__(weights, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)

    optim.Muon = InItsPlace  # type: ignore[misc, assignment]


# ---- the data -----------------------------------------------------------------------------------


def short_rows_first(*stages: tuple[int, int]) -> Callable[[], None]:
    """The context grows: (until, parts): up to that step each row counts as so many shorter ones."""

    def change() -> None:
        count_steps()
        plain = GPT.forward

        def forward(self: GPT, ids: Tensor, targets: Tensor | None = None, *a: Any, **k: Any) -> Tensor:
            if targets is not None and torch.is_grad_enabled():
                parts = next((parts for until, parts in stages if STEP[0] <= until), 1)
                ids, targets = (t.reshape(len(t) * parts, -1) for t in (ids, targets))
            return plain(self, ids, targets, *a, **k)

        GPT.forward = forward  # type: ignore[method-assign]

    return change


def batch_warmup(batches: int) -> Callable[[], None]:
    """Each of the first batches makes two steps, of half its rows each."""

    def change() -> None:
        plain = DatasetPrep.__next__
        read, later = [0], list[Batch]()

        def halves(self: DatasetPrep) -> Batch:
            if later:
                return later.pop()
            batch = plain(self)
            read[0] += 1
            if read[0] > batches:
                return batch
            n = len(batch.inputs) // 2
            first, second = (
                Batch(x, y, int((y != IGNORED).sum()), sources)
                for x, y, sources in (
                    (batch.inputs[:n], batch.targets[:n], batch.sources[:n]),
                    (batch.inputs[n:], batch.targets[n:], batch.sources[n:]),
                )
            )
            later.append(second)
            return first

        DatasetPrep.__next__ = halves  # type: ignore[method-assign]

    return change


VARIANTS: dict[str, Callable[[], None]] = {
    "out-projections-small": out_projections_small,
    "embedding-norm": embedding_norm,
    "qk-gain-1.5": qk_gain(math.sqrt(1.5)),
    "residual-scalars": residual_scalars,
    "first-input-shortcut": first_input_shortcut,
    "documents-apart": documents_apart,
    "weights-averaged-10": weights_averaged(0.9),
    "weights-averaged-50": weights_averaged(0.98),
    "momentum-warmup-100": momentum_warmup(100),
    "momentum-0.9": momentum_of(0.9),
    "muon-by-kind": muon_by_kind,
    "muon-unsplit": muon_unsplit,
    "muon-mlp-whole": muon_in_parts(2**62, 2**62),
    "muon-mlp-in-128s": muon_in_parts(128, 128),
    "muon-mlp-in-32s": muon_in_parts(32, 32),
    "muon-mlp-in-16s": muon_in_parts(16, 16),
    "muon-all-in-64s": muon_in_parts(64, 64, 64),
    "cautious-decay": cautious_decay,
    "normuon": normuon,
    "polar-5": other_polynomials(*FROM_1E_3),
    "polar-4-from-0.003": other_polynomials(*FROM_3E_3),
    "balanced-rows-4": balanced_rows(*optim._POLYNOMIALS),
    "balanced-rows-3": balanced_rows(*FROM_2E_2),
    "torch-muon": torch_muon,
    "adamw-blocks": adamw_blocks,
    "short-rows-first": short_rows_first((100, 4)),
    "short-rows-first-200": short_rows_first((67, 4)),  # of 200 steps
    "short-rows-first-100": short_rows_first((33, 4)),  # of 100 steps
    "short-rows-half": short_rows_first((150, 4)),
    "rows-grow": short_rows_first((50, 8), (100, 4), (150, 2)),
    "batch-warmup": batch_warmup(50),
    "batch-warmup-100": batch_warmup(25),  # with --train.max_steps 125 the tokens of 100 steps
    "batch-warmup-300": batch_warmup(75),  # with --train.max_steps 375 those of 300
}


def main() -> int:
    import train

    names = sys.argv[1].split(",") if len(sys.argv) > 1 else []
    if not names or not VARIANTS.keys() >= set(names):
        print(
            f"usage: python bench/variants.py NAME[,NAME] [options of train.py]; names: {', '.join(VARIANTS)}",
            file=sys.stderr,
        )
        return 2
    for name in names:
        VARIANTS[name]()
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
