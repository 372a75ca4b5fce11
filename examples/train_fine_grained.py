"""Train the paper's fine-grained decoder on text, one byte a token: any files or folders, or the sources of Python itself.

    python examples/train_fine_grained.py --granularity 4 --backend moec
    python examples/train_fine_grained.py ~/texts novel.txt --granularity 8 --steps 2000 --out runs/g8
    python examples/train_fine_grained.py --out runs/g8 --resume           # goes on where it was, after Ctrl-C as well

Which bytes step s sees follows from the seed and s alone, so that a run that was interrupted has the loss curve of one that was
not. The checkpoint is written beside the old one and then takes its name: there is always a whole one. `OUT/losses.json` holds
the loss of every step, in nats per byte, without auxiliary losses; bits per byte on held-out text are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moec
from moec.models.fine_grained import FineGrainedDecoder

VOCAB = 256
HELD_OUT = 0.05
# What may differ between the run that was interrupted and the one that goes on.
FREE = ("out", "resume", "backend", "checkpoint_every", "stop_at", "quiet")


def text_files(places: Iterable[Path]) -> Iterator[Path]:
    """The files among `places`, and those in folders, sorted, so that the order is the same everywhere."""
    for place in places:
        if not place.exists():
            sys.exit(f"{place} does not exist; name files or folders of text, or none for the sources of Python")
        yield from sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]


def read(places: list[Path], most: int) -> Tensor:
    """The first `most` bytes of the text, uint8 [N]."""
    files = text_files(places) if places else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found = bytearray()
    for path in files:
        found += path.read_bytes()
        if len(found) >= most:
            break
    return torch.frombuffer(found[:most], dtype=torch.uint8)


def split(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(train, held out): the end of the text is held out, at least one sequence of it."""
    held = max(int(len(text) * HELD_OUT), length + 1)
    if len(text) < 2 * held:
        sys.exit(f"{len(text)} bytes of text are too few for sequences of {length}; name more, or lower --length")
    return text[:-held], text[-held:]


def batch(text: Tensor, args: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, int64 [B, L]: a function of the text, the seed and the step."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - args.length, (args.batch,), generator=generator)
    rows = text[starts.unsqueeze(1) + torch.arange(args.length + 1)].long()
    return rows[:, :-1].to(args.device), rows[:, 1:].to(args.device)


def build(args: argparse.Namespace) -> FineGrainedDecoder:
    torch.manual_seed(args.seed)

    def make_moe(d_model: int, d_ff: int) -> nn.Module:
        return moec.nn.MoE(
            d_model,
            d_ff,
            args.expansion,
            args.granularity,
            router=args.router,
            activation=args.activation,
            gated=args.gated,
            shared_experts=args.shared_experts,
            capacity_factor=args.capacity_factor,
            balance_loss=args.balance_loss,
            z_loss=args.z_loss,
        )

    model = FineGrainedDecoder(VOCAB, args.d_model, args.blocks, make_moe, num_heads=args.heads, max_length=args.length)
    return model.to(args.device)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """The paper's: 1% of the steps to warm up, then a cosine down to a tenth."""
    warmup = max(args.steps // 100, 1)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(args.steps - warmup, 1)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def cross_entropy(call: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(call(inputs).flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, call: Callable[[Tensor], Tensor], text: Tensor, args: argparse.Namespace) -> float:
    model.eval()
    losses = [cross_entropy(call, *batch(text, args, step)).item() for step in range(8)]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def save(path: Path, state: dict[str, object]) -> None:
    """Whole or not at all: a reader, or a crash, sees either the old file or the new one."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextmanager
def first_interrupt() -> Iterator[list[int]]:
    """A list that gets an entry at the first Ctrl-C, so that the step in hand is finished; the second one raises as usual."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def settings(args: argparse.Namespace) -> dict[str, object]:
    kept = {name: value for name, value in vars(args).items() if name not in FREE}
    return {**kept, "text": [str(p) for p in args.text]}


def load(path: Path, args: argparse.Namespace) -> dict[str, object]:
    if not path.exists():
        sys.exit(f"nothing to resume: {path} does not exist; leave --resume out to start")
    state: dict[str, object] = torch.load(path, map_location=args.device)
    was, now = state["settings"], settings(args)
    differing = [f"--{k.replace('_', '-')} was {was.get(k)!r}, is {v!r}" for k, v in now.items() if was.get(k) != v]
    if differing:
        sys.exit(f"{path} is of another run: {'; '.join(differing)}. Say what it was, or choose another --out")
    return state


def train(args: argparse.Namespace) -> list[float]:
    """The loss of every step, those before a resume included."""
    train_text, held_text = split(read(args.text, args.max_bytes), args.length)
    model = build(args)
    call = model if args.backend == "eager" else torch.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    args.out.mkdir(parents=True, exist_ok=True)
    path, losses = args.out / "checkpoint.pt", []
    if args.resume:
        state = load(path, args)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = list(state["losses"])
    elif path.exists():
        sys.exit(f"{path} is there already: say --resume to go on with it, or choose another --out")
    balanced = any(layer.router.expert_bias is not None for layer in moec.nn.layers(model))
    has_aux = bool(args.balance_loss or args.z_loss)

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        save(path, {**state, "settings": settings(args)})
        (args.out / "losses.json").write_text(json.dumps(losses) + "\n")

    last = min(args.steps, args.stop_at or args.steps)
    bar = tqdm(range(len(losses), last), initial=len(losses), total=args.steps, unit="step", disable=args.quiet)
    started, before = time.perf_counter(), len(losses)
    with first_interrupt() as interrupted:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            loss = cross_entropy(call, *batch(train_text, args, step))
            optimizer.zero_grad()
            (loss + moec.nn.aux_loss(model) if has_aux else loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if balanced:
                moec.nn.update_biases(model)
            losses.append(loss.item())
            rate = (step + 1 - before) * args.batch * args.length / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:,.0f} tokens/s", refresh=False)
            if (step + 1) % args.checkpoint_every == 0:
                checkpoint()
            if interrupted:
                print(f"\ninterrupted after {len(losses)} steps; --resume goes on", file=sys.stderr)
                break
    checkpoint()
    if not args.quiet:
        bits = bits_per_byte(model, call, held_text, args)
        print(f"{len(losses)} steps, {bits:.3f} bits per byte on held-out text, {path}")
    return losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", nargs="*", type=Path, help="files or folders; none: the sources of Python's library")
    add("--backend", default="moec", choices=["eager", "inductor", "moec"])
    add("--granularity", type=int, default=4)
    add("--expansion", type=int, default=4)
    add("--d-model", type=int, default=128)
    add("--blocks", type=int, default=2)
    add("--heads", type=int, help="default: d_model / 64")
    add("--router", default="softmax", choices=moec.nn.ROUTERS)
    add("--activation", default="relu", choices=moec.nn.ACTIVATIONS)
    add("--gated", action="store_true")
    add("--shared-experts", type=int, default=0)
    add("--capacity-factor", type=float)
    add("--balance-loss", type=float, default=0.0, help="0.01 is usual, with a softmax router")
    add("--z-loss", type=float, default=0.001)
    add("--length", type=int, default=256)
    add("--batch", type=int, default=8)
    add("--steps", type=int, default=500)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--max-bytes", type=int, default=32_000_000)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/fine_grained"))
    add("--resume", action="store_true")
    add("--checkpoint-every", type=int, default=100)
    add("--stop-at", type=int, help="stop after that step, as if interrupted there")
    add("--quiet", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
