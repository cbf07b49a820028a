"""A small language model on several processes: FSDP2, a head whose vocabulary they share, and SGD.

    torchrun --nproc-per-node 2 docs/recipe_distributed.py             # the vocabulary among 2 processes
    torchrun --nproc-per-node 2 docs/recipe_distributed.py --tensor 1  # the batch among 2
    torchrun --nproc-per-node 4 docs/recipe_distributed.py             # the batch among 2, the vocabulary among 2

On GPUs, if there is one for each process (NCCL), else on the CPU (gloo). The processes form a mesh, data × tensor.
Each row of it has a share of the batch; the processes of a row have the same share, and a part of the vocabulary
each. All parameters are sharded over the rows of the mesh, the head over both dimensions. The text is this file.

Each step is also taken in one process by PyTorch alone, and the two must agree.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fastloss import SGD, linear_cross_entropy_with_accuracy

VOCABULARY, FEATURES, HEADS, LAYERS = 256, 32, 2, 2  # of bytes
ROWS, LENGTH = 8, 48  # of a batch, over all processes
OPTIONS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-3}
MAX_NORM = 1.0


# ----------------------------------------------------------------------------- the model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 4 * FEATURES), nn.GELU(), nn.Linear(4 * FEATURES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.movedim(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Head(nn.Module):
    """The linear map to the vocabulary and its loss, without the logits. FSDP gathers the weight for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, FEATURES) / FEATURES**0.5)

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the labels that count: of the losses, and of the right predictions."""
        loss, right = linear_cross_entropy_with_accuracy(hidden, self.weight, labels, reduction="sum")
        return loss, right


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, FEATURES), nn.Embedding(LENGTH, FEATURES)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(FEATURES), Head()

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        hidden: Tensor = self.norm(x)
        return hidden

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sums: tuple[Tensor, Tensor] = self.head(self.hidden(tokens), labels)
        return sums


def batches(steps: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Tokens and the next ones, of all processes together; those of a row's beginning don't count, as a prompt's."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (ROWS, 1), generator=generator)
        rows = text[starts + torch.arange(LENGTH + 1)]
        tokens, labels = rows[:, :-1], rows[:, 1:].clone()
        prompts = torch.randint(LENGTH // 2, (ROWS, 1), generator=generator)
        labels[torch.arange(LENGTH) < prompts] = -100
        result.append((tokens.to(device), labels.to(device)))
    return result


# ----------------------------------------------------------------------------- on a mesh


def distribute(model: LanguageModel, mesh: DeviceMesh) -> None:
    """In place. The head's classes over one dimension of the mesh; then all parameters over the other, by FSDP."""
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh["tensor"], [Shard(0)]))
    for part in (*model.blocks, model.head, model):
        fully_shard(part, mesh=mesh["data"])


def step(model: nn.Module, optimizer: SGD, tokens: Tensor, labels: Tensor, data: DeviceMesh) -> tuple[Tensor, Tensor]:
    """One step on this process's rows; the loss and the accuracy over the rows of all."""
    group = data.get_group()
    counted = (labels != -100).sum()
    dist.all_reduce(counted, group=group)  # the processes' rows have unequal numbers of labels
    # DTensors, as the head's weight is: the same on the processes that share the vocabulary.
    loss, right = (value.to_local() for value in model(tokens, labels))
    (loss * data.size() / counted).backward()  # FSDP takes the mean over the data dimension
    optimizer.step()
    optimizer.zero_grad()
    sums = torch.stack([loss.detach(), right.to(loss.dtype)])
    dist.all_reduce(sums, group=group)
    mean_loss, accuracy = sums / counted
    return mean_loss, accuracy


# ----------------------------------------------------------------------------- one process, PyTorch alone


def step_alone(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(model.hidden(tokens), model.head.weight).flatten(0, 1)
    labels = labels.flatten()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), (logits.argmax(1) == labels).sum() / (labels != -100).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tensor", type=int, help="processes among which the vocabulary is divided (default: 2, or 1)"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    arguments = parser.parse_args()

    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    processes = dist.get_world_size()
    tensor = arguments.tensor or (2 if processes % 2 == 0 else 1)
    if processes % tensor or ROWS % (processes // tensor):
        parser.error(
            f"--tensor {tensor} must divide {processes} processes, and what is left the {ROWS} rows of a batch"
        )
    mesh = init_device_mesh(device.type, (processes // tensor, tensor), mesh_dim_names=("data", "tensor"))

    torch.set_default_dtype(getattr(torch, arguments.dtype))
    torch.manual_seed(0)
    alone = LanguageModel().to(device)
    model = LanguageModel().to(device)
    model.load_state_dict(alone.state_dict())
    distribute(model, mesh)
    optimizer = SGD(model.parameters(), **OPTIONS, max_norm=MAX_NORM)  # made after the parameters are sharded
    optimizer_alone = torch.optim.SGD(alone.parameters(), **OPTIONS)

    shares, share = mesh["data"].size(), mesh["data"].get_local_rank()
    tolerance = 1e-3 if arguments.dtype == "float32" else 1e-9
    first = dist.get_rank() == 0
    if first:
        print(f"{processes} processes on {device.type}: {shares} x {tensor} (data x tensor)")
        print("step  loss      in one process  accuracy  in one process")
    for number, (tokens, labels) in enumerate(batches(arguments.steps, device)):
        loss, accuracy = step(
            model, optimizer, tokens.chunk(shares)[share], labels.chunk(shares)[share], mesh["data"]
        )
        loss_alone, accuracy_alone = step_alone(alone, optimizer_alone, tokens, labels)
        if first:
            print(f"{number:4}  {loss:.6f}  {loss_alone:.6f}        {accuracy:.4f}    {accuracy_alone:.4f}")
        torch.testing.assert_close(loss, loss_alone, rtol=tolerance, atol=0.0)
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), other, rtol=tolerance, atol=tolerance)
    if first:
        print("equal in every step, and so are the weights")
    dist.barrier()  # a process that leaves first takes its connections with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
