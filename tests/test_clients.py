"""The programs of docs/recipes.md, run as they stand there, beside the same ones over PyTorch's own loss."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss
from fastloss.loss import routes

RECIPES = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


def recipe(title: str) -> Callable[..., dict[str, Any]]:
    """The code under a heading: called with the names that it starts from, it gives all those that it then has."""
    text = RECIPES.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    code = compile(block, f"{RECIPES.name}: {title}", "exec")

    def run(**given: Any) -> dict[str, Any]:
        names = {"__name__": "recipe", **given}
        exec(code, names)
        return names

    return run


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it: the backend is chosen by itself. What is written is written here, and nothing is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_every_recipe_is_run_here() -> None:
    titles = re.findall(r"^## (.*)$", RECIPES.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == [
        "Any language model, by one line",
        "Hugging Face Trainer",
        "A causal language model without its logits",
        "Logits that are scaled",
        "Losses of tokens",
        "TRL's trainers",
        "TRL's SFT and GRPO in three products",
        "Distillation without logits",
        "PyTorch Lightning",
        "Mixup",
        "SGD in Hugging Face's Trainer",
        "SGD in PyTorch Lightning",
        "SGD over FSDP2",
        "FSDP2 and a vocabulary that processes share",
    ]


def lightning_trainer(folder: Path, **options: Any) -> Any:
    """Return a Trainer on the CPU that writes no checkpoints and prints nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pytest.importorskip("lightning").Trainer(
        accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **quiet, **options
    )


# ----------------------------------------------------------------------------- Hugging Face


def llama(classes: int, length: int, **options: Any) -> Any:
    """Return a causal language model of one narrow layer, unless ``options`` say otherwise."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **options,
    }
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=classes, max_position_embeddings=length, **sizes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Any language model, by one line", "Hugging Face Trainer"])
def test_hugging_face_trainer(title: str, tmp_path: Path, fused: list[tuple[int, ...]]) -> None:
    """The loss that is logged at each step and the weights at the end are those of the model's default loss, with
    sequences of unequal lengths over two accumulated batches; the loss of an evaluation too.
    """
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    steps, batch, length, classes = 4, 4, 48, 2048
    first = llama(classes, length)
    tokens = torch.randint(classes, (2 * steps * batch, length))
    labels = tokens.clone()
    for row, counted in zip(labels, torch.randint(5, length, (len(labels),)).tolist(), strict=True):
        row[counted:] = -100  # as padding is marked; the share that counts differs from batch to batch
    dataset = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]

    def arguments(name: str) -> Any:
        return transformers.TrainingArguments(
            str(tmp_path / name),
            max_steps=steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=7,
        )

    names = recipe(title)(model=copy.deepcopy(first), training_arguments=arguments("ours"), dataset=dataset)
    ours = names["trainer"]
    if "report" in names:
        assert (names["report"].fused, names["report"].made) == (2 * steps, 0)
    else:
        assert fused, "the batches are so small that torch's own operator served them"
    theirs = transformers.Trainer(copy.deepcopy(first), arguments("theirs"), train_dataset=dataset)
    theirs.train()

    our_losses, their_losses = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs))
    assert len(our_losses) == steps
    assert our_losses == pytest.approx(their_losses, rel=1e-4)
    their_weights = dict(theirs.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        assert not torch.equal(weight.cpu(), dict(first.named_parameters())[name])
        torch.testing.assert_close(weight, their_weights[name], rtol=1e-4, atol=1e-4)
    ours_later, theirs_later = (t.evaluate(dataset[:batch])["eval_loss"] for t in (ours, theirs))
    assert ours_later == pytest.approx(theirs_later, rel=1e-4)


def padded(rows: int, length: int, classes: int) -> dict[str, Tensor]:
    """A batch of random tokens, each row of another number of them."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row, counted in zip(mask, torch.randint(5, length, (rows,)).tolist(), strict=True):
        row[counted:] = 0
    return {"input_ids": torch.randint(classes, (rows, length)), "attention_mask": mask}


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_language_model_without_its_logits(tied: bool) -> None:
    """Each step's loss and accuracy, and the weights at the end, are those of the model's own loss; with padding, and
    with a head that is the embedding too.
    """
    steps, rows, length, classes = 5, 4, 24, 512
    first = llama(classes, length, num_hidden_layers=2, tie_word_embeddings=tied)
    assert (first.lm_head.weight is first.model.embed_tokens.weight) is tied
    batches = [padded(rows, length, classes) for _ in range(steps)]

    ours, theirs = copy.deepcopy(first), copy.deepcopy(first)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    our_steps = list(recipe("A causal language model without its logits")()["train"](ours, optimizer, batches))
    their_steps = []
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        output = theirs(**batch, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        counted = labels[:, 1:] != -100
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:]) & counted
        their_steps.append((output.loss.item(), float(right.sum() / counted.sum())))
    for mine, other in zip(our_steps, their_steps, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    their_weights = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert not torch.equal(weight, dict(first.named_parameters())[name])
        torch.testing.assert_close(weight, their_weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_without_logits(beta: float) -> None:
    """Each step's loss, and the weights at the end, are those of the plain form over both models' logits (which is
    TRL's ``generalized_jsd_loss`` with its default reduction); with padding.
    """
    steps, rows, length, classes, temperature = 3, 3, 16, 256, 2.0
    teacher, first = llama(classes, length, hidden_size=24), llama(classes, length)
    batches = [padded(rows, length, classes) for _ in range(steps)]

    ours, theirs = copy.deepcopy(first), copy.deepcopy(first)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    our_losses = list(recipe("Distillation without logits")()["train"](ours, teacher, optimizer, batches, beta))
    their_losses = []
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for batch in batches:
        counted = batch["attention_mask"][:, 1:] == 1
        with torch.no_grad():
            of_teacher = (teacher(**batch).logits[:, :-1][counted] / temperature).log_softmax(-1)
        of_student = (theirs(**batch).logits[:, :-1][counted] / temperature).log_softmax(-1)
        if beta in (0, 1):
            pair = (of_student, of_teacher) if beta == 0 else (of_teacher, of_student)
            loss = F.kl_div(*pair, reduction="batchmean", log_target=True)
        else:
            mixture = torch.log(beta * of_teacher.exp() + (1 - beta) * of_student.exp())
            sides = zip((beta, 1 - beta), (of_teacher, of_student), strict=True)
            parts = [w * F.kl_div(mixture, side, reduction="batchmean", log_target=True) for w, side in sides]
            loss = parts[0] + parts[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        their_losses.append(loss.item())
    assert our_losses == pytest.approx(their_losses, rel=1e-4)
    their_weights = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert not torch.equal(weight, dict(first.named_parameters())[name])
        torch.testing.assert_close(weight, their_weights[name], rtol=1e-4, atol=1e-5)


def test_losses_of_tokens() -> None:
    """Each step's loss, and the weights at the end, are those of the plain form over the logits."""
    steps, rows, length, classes = 4, 3, 20, 256
    first, run = llama(classes, length), recipe("Losses of tokens")()
    batches = []
    for _ in range(steps):
        batch = {name: torch.randn(rows, length) for name in ("old", "reference", "advantages")}
        batch["old"], batch["reference"] = batch["old"] / 8 - 5.5, batch["reference"] / 4 - 5.5
        batch["input_ids"], batch["attention_mask"] = torch.randint(classes, (rows, length)), torch.ones(rows, length)
        batch["completion_mask"] = (torch.arange(length) >= torch.randint(3, 10, (rows, 1))).long()
        batches.append(batch)

    ours, theirs = copy.deepcopy(first), copy.deepcopy(first)
    our_losses = list(run["train"](ours, torch.optim.SGD(ours.parameters(), lr=0.5), batches))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for batch, mine in zip(batches, our_losses, strict=True):
        logits = theirs(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        log_p = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        counted, constants = (
            batch["completion_mask"][:, 1:],
            [batch[name][:, 1:] for name in ("old", "reference", "advantages")],
        )
        loss = (run["grpo"](log_p, None, *constants) * counted).sum() / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert mine == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    their_weights = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, their_weights[name], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- TRL

Batch = dict[str, Any]
TOKENS, PADDING = 300, 0
SCALED: Batch = {"of_model": {"tie_word_embeddings": True, "logits_scaling": 0.5, "final_logit_softcapping": 3.0}}


def trl_trainer(name: str | type, folder: Path, model: Any, **options: Any) -> Any:
    """Return TRL's trainer of that name, or a subclass of one, for a copy of ``model`` with other weights."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {"<pad>": PADDING, "<eos>": 1, **{f"w{i}": i for i in range(2, TOKENS)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>"
    )
    trainer = getattr(trl, name) if isinstance(name, str) else name
    kind = next(each.__name__ for each in trainer.__mro__ if each.__module__.startswith("trl."))
    rows: dict[str, Batch] = {
        "SFTTrainer": {"prompt": "w2 w3", "completion": " w4"},
        "DPOTrainer": {"prompt": "w2 w3", "chosen": " w4", "rejected": " w5"},
        "GRPOTrainer": {"prompt": "w2 w3"},
    }
    given: Batch = {"train_dataset": datasets.Dataset.from_list([rows[kind]] * 8), "processing_class": tokenizer}
    if kind == "GRPOTrainer":
        given["reward_funcs"] = lambda completions, **_: [float(len(set(each))) for each in completions]
    arguments = getattr(trl, kind.replace("Trainer", "Config"))(
        str(folder), report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, **options
    )
    result = trainer(copy.deepcopy(model), args=arguments, **given)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a step away from the reference, which TRL loads from the disk
        for weight in result.model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return result


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes a model which is on the disk, where TRL looks for the reference of it."""

    def make(**options: Any) -> Any:
        transformers = pytest.importorskip("transformers")
        llama(TOKENS, 32, **options).save_pretrained(tmp_path / "model")
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    return make


def of_model(saved: Callable[..., Any], options: Batch) -> tuple[Any, Batch]:
    """Return the model that a case asks for, and its options of the trainer."""
    others = {name: value for name, value in options.items() if name != "of_model"}
    return saved(**options.get("of_model", {})), others


def sequences(rows: int, length: int, prompt: int) -> Batch:
    """Return tokens of which the first are a prompt and the last padding, as many as may be."""
    tokens, place = torch.randint(2, TOKENS, (rows, length)), torch.arange(length)
    ends = torch.randint(prompt + 1, length + 1, (rows, 1))
    attended = (place < ends).long()
    tokens = tokens.masked_fill(attended == 0, PADDING)
    return {"input_ids": tokens, "attention_mask": attended, "completion_mask": attended * (place >= prompt)}


def trl_batch(kind: str, beta: float = 0.0) -> Batch:
    """Return the inputs of a step of TRL's trainer."""
    length, prompt = 12, 4
    batch = sequences(6, length, prompt)
    if kind == "SFT":
        counted = batch.pop("completion_mask")
        return {**batch, "labels": batch["input_ids"].masked_fill(counted == 0, -100)}
    if kind == "DPO":
        return batch
    completion_mask = batch["completion_mask"][:, prompt:]
    numbers = {name: torch.randn(completion_mask.shape) / 4 - 5.7 for name in ("old", "ref")}
    return {
        "prompt_ids": batch["input_ids"][:, :prompt],
        "prompt_mask": batch["attention_mask"][:, :prompt],
        "completion_ids": batch["input_ids"][:, prompt:],
        "completion_mask": completion_mask,
        "advantages": torch.randn(len(completion_mask)),
        "old_per_token_logps": numbers["old"],
        "num_items_in_batch": completion_mask.sum(),
        **({"ref_per_token_logps": numbers["ref"]} if beta else {}),
    }


def step_of(trainer: Any, batch: Batch, **named: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Return the loss, the gradient of each parameter and the numbers that are logged."""
    trainer.model.train()
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = "importance_sampling_ratio" in batch
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, dict(batch), **named)
    loss.backward()
    gradients = {name: each.grad for name, each in trainer.model.named_parameters()}
    return loss, gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same_step(ours: Any, theirs: Any, logged: set[str]) -> None:
    (loss, gradients, numbers), (their_loss, their_gradients, their_numbers) = ours, theirs
    torch.testing.assert_close(loss, their_loss)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, their_gradients[name])
    assert logged <= numbers.keys()
    for name, value in numbers.items():
        assert value == pytest.approx(their_numbers[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "logged"),
    [
        ("SFT", SCALED, {"entropy", "mean_token_accuracy"}),
        ("SFT", {"loss_type": "dft"}, {"entropy"}),
        ("DPO", {"use_weighting": True}, {"logits/chosen", "mean_token_accuracy", "entropy", "rewards/margins"}),
        ("DPO", {"loss_type": "ipo"}, {"logits/rejected"}),
        ("GRPO", {"beta": 0.1, "temperature": 0.7}, {"kl", "entropy", "clip_ratio/region_mean"}),
        ("GRPO", {"loss_type": "cispo", "epsilon_high": 5.0, "entropy_coef": 0.01}, {"entropy"}),
    ],
)
def test_trl(
    kind: str, options: Batch, logged: set[str], saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trainer's loss, its gradients and what it logs are those over TRL's own kernel."""
    trl = pytest.importorskip("trl")
    batch, first, options = trl_batch(kind, options.get("beta", 0.0)), *of_model(saved, options)
    theirs = trl_trainer(f"{kind}Trainer", tmp_path, first, **options)
    their_step = step_of(theirs, batch)
    monkeypatch.setattr(
        trl.trainer.utils, "_ChunkedLogProbFunction", trl.trainer.utils._ChunkedLogProbFunction
    )  # back at the end
    of_recipe = recipe("TRL's trainers")()["TokenNumbers"]
    assert trl.trainer.utils._ChunkedLogProbFunction is of_recipe
    ours = trl_trainer(f"{kind}Trainer", tmp_path, first, **options)
    assert_same_step(step_of(ours, batch), their_step, logged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("SFT", {}, {"num_items_in_batch": torch.tensor(29)}),
        ("SFT", SCALED, {}),
        ("GRPO", {}, {}),
        ("GRPO", {**SCALED, "beta": 0.1, "temperature": 0.7, "epsilon_high": 0.28}, {}),
        ("GRPO", {"beta": 0.1, "loss_type": "grpo", "use_bias_correction_kl": False}, {}),
    ],
)
def test_trl_in_three_products(
    kind: str, options: Batch, named: Batch, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss, its gradients and what is logged are TRL's, whose kernel is not called. All of it is computed within
    the model's forward, so that DDP, of one process here that triples what it averages, sees every gradient.
    """
    trl = pytest.importorskip("trl")
    batch, first, options = trl_batch(kind, options.get("beta", 0.0)), *of_model(saved, options)
    if kind == "GRPO" and options.get("temperature"):
        batch["tool_mask"] = torch.randint(2, batch["completion_mask"].shape)
        batch["importance_sampling_ratio"] = torch.rand(batch["completion_mask"].shape) + 0.5
    their_step = step_of(trl_trainer(f"{kind}Trainer", tmp_path, first, **options), batch, **named)
    trainer = recipe("TRL's SFT and GRPO in three products")()[f"Token{kind}Trainer"]
    ours = trl_trainer(trainer, tmp_path, first, **options)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)
    logged = {"mean_token_accuracy"} if kind == "SFT" else {"entropy"}
    our_step = step_of(ours, batch, **named)
    assert_same_step(our_step, their_step, logged)
    gradients = {name: gradient.clone() for name, gradient in our_step[1].items()}
    ours.model.zero_grad()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours.model)
        wrapped.register_comm_hook(None, tripled)
        ours.compute_loss(wrapped, dict(batch), **named).backward()
        for name, weight in ours.model.named_parameters():
            torch.testing.assert_close(weight.grad, 3 * gradients[name])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"), [("SFT", {"loss_type": "dft"}), ("GRPO", {"loss_type": "cispo"}), ("GRPO", {"delta": 1.5})]
)
def test_what_three_products_do_not_cover_is_trls(kind: str, options: Batch, saved: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    batch, first = trl_batch(kind), saved()
    trainer = recipe("TRL's SFT and GRPO in three products")()[f"Token{kind}Trainer"]
    ours, theirs = (
        step_of(trl_trainer(each, tmp_path, first, **options), batch) for each in (trainer, f"{kind}Trainer")
    )
    assert ours[2].keys() == theirs[2].keys()  # all that is logged
    assert_same_step(ours, theirs, {"entropy"})


def tripled(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses other annotations than its own
    """Return what DDP takes for the mean of a bucket of gradients."""
    future = torch.futures.Future()
    future.set_result(3 * bucket.buffer())
    return future


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "GRPO"])
def test_trl_trains_in_three_products(kind: str, saved: Any, tmp_path: Path) -> None:
    """Over some steps of accumulated batches, and an evaluation, the losses are TRL's."""
    pytest.importorskip("trl")
    first, options = saved(), {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "seed": 3}
    if kind == "GRPO":
        options |= {"num_generations": 4, "max_completion_length": 5, "num_iterations": 2, "beta": 0.1}
    histories = []
    for trainer in (f"{kind}Trainer", recipe("TRL's SFT and GRPO in three products")()[f"Token{kind}Trainer"]):
        torch.manual_seed(5)
        of_kind = trl_trainer(trainer, tmp_path, first, **options)
        of_kind.train()
        histories.append([(e["loss"], e["grad_norm"]) for e in of_kind.state.log_history if "loss" in e])
    assert len(histories[0]) == 2
    for (mine, norm), (other, their_norm) in zip(*histories, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
        assert norm == pytest.approx(their_norm, rel=1e-4)
        assert norm > 0


# ----------------------------------------------------------------------------- Lightning


def test_lightning(tmp_path: Path, fused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same program with torch's loss and torchmetrics' accuracies in the place of ours logs the same numbers at
    each step and each epoch, and ends with the same weights.
    """
    lightning = pytest.importorskip("lightning")
    metrics = pytest.importorskip("torchmetrics").functional.classification
    epochs, steps, rows, classes = 2, 4, 1024, 300
    first = nn.Linear(12, classes)
    data = torch.utils.data.TensorDataset(torch.randn(steps * rows, 12), torch.randint(classes, (steps * rows,)))
    loader = torch.utils.data.DataLoader(data, batch_size=rows)

    class Log(lightning.Callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def run(name: str) -> tuple[list[dict[str, float]], dict[str, float], nn.Module]:
        log = Log()
        trainer = lightning_trainer(tmp_path / name, max_epochs=epochs, callbacks=[log])
        names = recipe("PyTorch Lightning")(
            trainer=trainer,
            body=copy.deepcopy(first),
            classes=classes,
            training_data=loader,
            validation_data=loader,
        )
        last = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return log.steps, last, names["classifier"].body

    def top(k: int, logits: Tensor, target: Tensor) -> Tensor:
        return metrics.multiclass_accuracy(logits, target, classes, average="micro", top_k=k)

    def with_accuracy(logits: Tensor, target: Tensor, topk: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.cross_entropy(logits, target), tuple(top(k, logits, target) for k in topk)

    our_steps, our_last, ours = run("ours")
    assert fused, "the batches are so small that torch's own operator served them"
    monkeypatch.setattr(fastloss, "cross_entropy_with_accuracy", with_accuracy)
    micro = pytest.importorskip("torchmetrics").classification.MulticlassAccuracy(classes, average="micro")
    monkeypatch.setattr(fastloss, "Accuracy", lambda: micro, raising=False)
    their_steps, their_last, theirs = run("theirs")

    assert len(our_steps) == len(their_steps) == epochs * steps
    for mine, other in zip([*our_steps, our_last], [*their_steps, their_last], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
        assert {"loss", "top1", "top5"} <= set(mine)
    assert {"epoch_top1", "validation_top1"} <= set(our_last)
    assert our_last["epoch_top1"] == pytest.approx(sum(step["top1"] for step in our_steps[-steps:]) / steps)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


# ----------------------------------------------------------------------------- logits that are scaled


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        ({"logit_scale": 0.0625, "logits_scaling": None}, lambda z: z * 0.0625),
        ({"logits_scaling": 8.0}, lambda z: z / 8.0),
        ({"final_logit_softcapping": 5.0}, lambda z: 5.0 * torch.tanh(z / 5.0)),
    ],
    ids=["Cohere", "Granite", "Gemma"],
)
def test_models_that_scale_their_logits(config: dict[str, Any], plain: Callable[[Tensor], Tensor]) -> None:
    hidden, head = torch.randn(2, 6, 8, requires_grad=True), torch.randn(30, 8)
    labels = torch.randint(30, (2, 6))
    loss = recipe("Logits that are scaled")()["loss_of_model"](SimpleNamespace(**config), hidden, head, labels)
    logits = plain(hidden @ head.T)[:, :-1]
    expected = F.cross_entropy(logits.reshape(-1, 30), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in (loss, expected)))


def test_a_temperature_that_changes_and_a_trained_scale() -> None:
    names, model = recipe("Logits that are scaled")(), nn.Linear(5, 700)
    batches = [(torch.randn(500, 5), torch.randint(700, (500,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = list(names["annealed"](model, optimizer, batches, steps=4))
    for number, (x, y) in enumerate(batches):
        expected = F.cross_entropy(model(x) / (2.0 * 0.25 ** (number / 4)), y)
        assert losses[number] == pytest.approx(expected.item(), rel=1e-5)
    images, texts = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    log_scale = torch.tensor(2.0, requires_grad=True)
    names["clip_loss"](images, texts, log_scale).backward()
    assert log_scale.grad is not None
    assert log_scale.grad.abs() > 0


# ----------------------------------------------------------------------------- mixup


@pytest.mark.parametrize(("rows", "classes"), [(64, 10), (512, 1000)])
def test_mixup(rows: int, classes: int, fused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that are probabilities: each step's loss and accuracy, and the weights at the end, are torch's."""
    batches = [(torch.randn(rows, 3, 4), torch.randint(classes, (rows,))) for _ in range(4)]
    first = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))

    def run() -> tuple[list[tuple[float, float]], nn.Module]:
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        torch.manual_seed(0)  # the same mixtures
        return list(recipe("Mixup")()["train"](model, optimizer, batches, classes)), model

    our_steps, ours = run()
    assert fused or rows * classes <= routes.SMALL_ON_CPU
    monkeypatch.setattr(fastloss, "cross_entropy", F.cross_entropy)
    monkeypatch.setattr(fastloss, "accuracy", lambda x, y: (x.argmax(1) == y.argmax(1)).float().mean())
    their_steps, theirs = run()
    for mine, other in zip(our_steps, their_steps, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    for weight, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


def test_mixup_mixes_inputs_and_labels_alike() -> None:
    """Each image is its own one-hot label here: what becomes of the one becomes of the other."""
    labels = torch.randint(7, (20,))
    images, targets = recipe("Mixup")()["mixup"](F.one_hot(labels, 7).float(), labels, 7, alpha=1.0)
    torch.testing.assert_close(images, targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(20))
    assert len(targets.unique()) > 2


# ----------------------------------------------------------------------------- SGD


class ClippedSGD(torch.optim.SGD):
    """Torch's own, with torch's own clipping before each step, for recipes that ask for ``max_norm``."""

    def __init__(self, params: Any, *, max_norm: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.norms: list[float] = []
        self.max_norm = max_norm

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        self.norms.append(float(nn.utils.clip_grad_norm_(params, self.max_norm)))
        super().step()
        return loss


def test_sgd_in_hugging_face_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses and rates that are logged, and the weights at the end, are those of torch's optimizer. Gradients are
    accumulated over two batches, and some have to be clipped.
    """
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    steps, batch, length, classes = 6, 2, 16, 64
    first = llama(classes, length)
    with torch.no_grad():
        first.lm_head.weight.mul_(10)
    tokens = torch.randint(classes, (2 * steps * batch, length))
    dataset = [{"input_ids": t, "labels": t} for t in tokens]

    def run(name: str) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path / name),
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2,
            max_grad_norm=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=7,
        )
        return recipe("SGD in Hugging Face's Trainer")(
            model=copy.deepcopy(first), training_arguments=arguments, dataset=dataset
        )

    ours = run("ours")
    assert type(ours["optimizer"]) is fastloss.SGD
    assert ours["optimizer"].grad_norm is not None
    monkeypatch.setattr(fastloss, "SGD", ClippedSGD)
    theirs = run("theirs")
    assert max(theirs["optimizer"].norms) > 1
    for key in ("loss", "learning_rate"):
        mine, other = ([e[key] for e in n["trainer"].state.log_history if key in e] for n in (ours, theirs))
        assert len(mine) == steps
        assert mine == pytest.approx(other, rel=1e-4)
    for weight, expected in zip(ours["model"].parameters(), theirs["model"].parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_sgd_in_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate climbs and falls, and each step's loss and the weights at the end are those of torch's optimizer."""
    lightning = pytest.importorskip("lightning")
    steps, rows, classes = 10, 16, 7
    first = nn.Linear(12, classes)
    data = torch.utils.data.TensorDataset(10 * torch.randn(steps * rows, 12), torch.randint(classes, (steps * rows,)))
    loader = torch.utils.data.DataLoader(data, batch_size=rows)

    class Log(lightning.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.rates: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.losses.append(float(trainer.callback_metrics["loss"]))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def run(name: str) -> tuple[Log, nn.Module, Any]:
        log = Log()
        trainer = lightning_trainer(tmp_path / name, max_epochs=1, callbacks=[log])
        body = copy.deepcopy(first)
        recipe("SGD in PyTorch Lightning")(trainer=trainer, body=body, training_data=loader)
        return log, body, trainer.optimizers[0]

    log, ours, optimizer = run("ours")
    assert type(optimizer) is fastloss.SGD
    monkeypatch.setattr(fastloss, "SGD", ClippedSGD)
    other, theirs, clipped = run("theirs")
    assert max(clipped.norms) > 1
    assert max(log.rates) == pytest.approx(0.1)
    assert log.rates[0] < 0.1 > log.rates[-1]
    assert log.rates == pytest.approx(other.rates)
    assert len(log.losses) == steps
    assert log.losses == pytest.approx(other.losses, rel=1e-4)
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_lightning_leaves_clipping_to_sgd(tmp_path: Path) -> None:
    """What the recipe says of Lightning's own clipping under automatic mixed precision."""
    data = torch.utils.data.TensorDataset(torch.randn(8, 12), torch.randint(7, (8,)))
    trainer = lightning_trainer(
        tmp_path,
        max_epochs=1,
        precision="bf16-mixed",  # Lightning gives a CPU no other; the plugin is that of 16-mixed
        gradient_clip_val=1.0,
    )
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        recipe("SGD in PyTorch Lightning")(
            trainer=trainer, body=nn.Linear(12, 7), training_data=torch.utils.data.DataLoader(data, batch_size=2)
        )


def test_sgd_over_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process here; ``test_sgd_worlds.py`` has it in two."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    batches = [(10 * torch.randn(8, 6), torch.randint(5, (8,))) for _ in range(4)]
    first = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5))

    def run() -> tuple[list[Tensor], Any]:
        names = recipe("SGD over FSDP2")(model=copy.deepcopy(first), batches=batches, device="cpu")
        return [p.full_tensor().detach() for p in names["model"].parameters()], names["optimizer"]

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ours, optimizer = run()
        assert type(optimizer) is fastloss.SGD
        monkeypatch.setattr(fastloss, "SGD", ClippedSGD)
        theirs, clipped = run()
    finally:
        torch.distributed.destroy_process_group()
    assert max(clipped.norms) > 1
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "arguments", "mesh"),
    [(2, [], "1 x 2"), (2, ["--tensor", "1"], "2 x 1"), (4, [], "2 x 2")],
    ids=["vocabulary", "batch", "both"],
)
def test_a_language_model_on_a_mesh(count: int, arguments: list[str], mesh: str) -> None:
    """docs/recipe_distributed.py, in float64: loss and accuracy of every step, and the weights at the end, are those
    of PyTorch in one process. The program itself ends in an error where they are not.
    """
    steps = 6
    program = str(RECIPES.with_name("recipe_distributed.py"))
    out = processes.torchrun(count, program, "--dtype", "float64", "--steps", str(steps), *arguments)
    head, titles, *lines, last = out.splitlines()
    assert head == f"{count} processes on cpu: {mesh} (data x tensor)"
    assert titles.split() == ["step", "loss", "in", "one", "process", "accuracy", "in", "one", "process"]
    assert last == "equal in every step, and so are the weights"
    losses = []
    for number, line in enumerate(lines):
        step, loss, loss_alone, accuracy, accuracy_alone = map(float, line.split())
        assert step == number
        assert loss == loss_alone
        assert accuracy == accuracy_alone
        losses.append(loss)
    assert len(losses) == steps
    assert losses[-1] < losses[0]
