"""The training loop: next-token loss, Muon and AdamW, growing lengths."""

import time
from dataclasses import dataclass

import torch

from model import Model, Shape

# Length, rows and share of the steps. Each step has 4,096 tokens. The last phase is a must: a model
# trained on short windows only fails beyond them.
PHASES = ((128, 32, 0.6), (512, 8, 0.3), (2048, 2, 0.1))
WARM_UP_STEPS = 60
# The learning rate is constant up to here, then falls in a line.
CONSTANT_SHARE = 0.6
LAST_RATE = 0.02


@dataclass
class Recipe:
    """What a run is made with."""

    steps: int = 1800
    seed: int = 1
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.1
    compile: bool = True
    threads: int = 2


class Windows:
    """Windows of token ids. Each begins at the start of a document."""

    def __init__(self, documents):
        self.documents = documents
        self.next = 0

    def batch(self, rows, length):
        """Inputs and targets, [rows, length] each."""
        windows = []
        for _ in range(rows):
            window = []
            while len(window) < length + 1:
                window += self.documents[self.next % len(self.documents)]
                self.next += 1
            windows.append(window[: length + 1])
        tokens = torch.tensor(windows)
        return tokens[:, :-1], tokens[:, 1:]


def phase_of(step, steps):
    """Length and rows of a step."""
    for length, rows, share in PHASES[:-1]:
        count = round(share * steps)
        if step < count:
            return length, rows
        step -= count
    length, rows, _ = PHASES[-1]
    return length, rows


def rate_of(step, steps):
    """The learning rate of a step, as a share of the base rate."""
    warm = min(1, (step + 1) / WARM_UP_STEPS)
    constant = int(steps * CONSTANT_SHARE)
    if step < constant:
        return warm
    return warm * max(LAST_RATE, (steps - step) / (steps - constant))


def optimisers_for(model, recipe):
    """Muon for the matrices, AdamW for the embedding and the norms."""
    embedding = model.embedding.weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() < 2 or p is embedding]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, momentum=0.95, ns_steps=4
    )
    adam = torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return [(muon, recipe.muon_rate), (adam, recipe.adam_rate)]


@torch.no_grad()
def validation_loss(model, documents, length, rows):
    """The mean loss on windows of held-out documents."""
    windows = Windows(documents)
    losses = [model(*windows.batch(1, length)).item() for _ in range(rows)]
    return sum(losses) / len(losses)


def train(recipe, documents, held_out):
    """Trains on documents of ids and returns the model."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    model = Model(Shape())
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    optimisers = optimisers_for(model, recipe)
    forward = torch.compile(model, dynamic=False) if recipe.compile else model
    windows = Windows(documents)
    started, total = time.time(), 0.0
    for step in range(recipe.steps):
        share = rate_of(step, recipe.steps)
        for optimiser, base in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = base * share
        length, rows = phase_of(step, recipe.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(*windows.batch(rows, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
        model.zero_grad()
        total += loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {total / 50:.4f} {time.time() - started:.0f} s", flush=True)
            total = 0.0
        if (step + 1) % 300 == 0 or step + 1 == recipe.steps:
            short = validation_loss(model, held_out, 512, 32)
            long = validation_loss(model, held_out, 2048, 8)
            print(f"  held out: {short:.4f} at 512, {long:.4f} at 2048", flush=True)
    return model
