"""The training loops in examples/ learn, keep the penalty's state in their checkpoints, and continue from them."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def example(name: str) -> ModuleType:
    """Imported where it is needed: Lightning and Transformers take seconds to start."""
    return importlib.import_module(name)


@pytest.mark.parametrize(("name", "epochs"), [("loop_pytorch", 3), ("loop_lightning", 3), ("loop_transformers", 2)])
def test_it_learns_with_the_penalty_and_without(name: str, epochs: int, capsys: pytest.CaptureFixture[str]) -> None:
    example(name).main(epochs)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    erm, fishr = (row[1:] for row in rows if row[0] in ("ERM", "Fishr"))
    assert erm[::2] == fishr[::2] == ["+80%", "+90%", "-90%"]
    for trained_on in (erm[1], erm[3], fishr[1], fishr[3]):
        assert float(trained_on.removesuffix("%")) > 65
    assert erm != fishr


def test_batches_hold_all_domains_equally_often() -> None:
    domains = torch.tensor([0] * 50 + [1] * 7 + [2] * 23)
    sampler = example("colored_digits").DomainsInTurn(domains)
    loader = DataLoader(TensorDataset(torch.arange(80), domains), batch_size=12, sampler=sampler)

    def epoch(number: int) -> list[Tensor]:
        sampler.set_epoch(number)
        batches = list(loader)
        for _, domains_of_batch in batches[:-1]:
            assert torch.bincount(domains_of_batch).tolist() == [4, 4, 4]
        assert sum(len(samples) for samples, _ in batches) == len(sampler) == 80
        return [samples for samples, _ in batches]

    first, second, first_again = (torch.cat(epoch(number)) for number in (0, 1, 0))
    assert torch.equal(first, first_again)
    assert not torch.equal(first, second)
    drawn = torch.cat([torch.cat(epoch(number)) for number in range(20)])
    assert len(drawn.unique()) == 80


def test_the_plain_loop_trains_the_featurizer_on_the_penalty() -> None:
    train = example("loop_pytorch").train
    model, without = train(with_penalty=True, epochs=1), train(with_penalty=False, epochs=1)
    assert not torch.equal(model["featurizer"][0].weight, without["featurizer"][0].weight)

    assert model.state_dict()["penalty.average.history"].abs().max() > 0
    assert model.state_dict()["balance.penalty_norm"] > 0
    assert model["balance"].weight() > 0

    inputs, targets, domains = example("colored_digits").training_samples().tensors
    features = model["featurizer"](inputs)
    penalty = model["penalty"](features, model["head"](features), targets, domains)
    assert penalty > 0
    for gradient in torch.autograd.grad(penalty, list(model["featurizer"].parameters())):
        assert gradient.abs().max() > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # continued in another folder, to compare
def test_a_continued_lightning_run_is_the_unbroken_one(tmp_path: Path) -> None:
    module = example("loop_lightning")
    loader = module.training_loader()

    def fit(name: str, epochs: int, checkpoint: str | None = None) -> tuple[nn.Module, str]:
        module.lightning.seed_everything(0, verbose=False)
        model = module.DigitClassifier(steps=2 * len(loader), with_penalty=True)
        trainer = module.trainer(tmp_path / name, epochs)
        trainer.fit(model, loader, ckpt_path=checkpoint)
        return model, trainer.checkpoint_callback.best_model_path

    unbroken, _ = fit("unbroken", 2)
    half, checkpoint = fit("half", 1)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert saved["penalty.average.history"].abs().max() > 0
    assert torch.equal(saved["penalty.average.history"], half.penalty.average.history)
    assert saved["balance.penalty_norm"] > 0

    continued, _ = fit("continued", 2, checkpoint)
    assert not torch.equal(continued.penalty.average.history, half.penalty.average.history)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_lightning_runs_the_head_outside_autocast(tmp_path: Path) -> None:
    module = example("loop_lightning")
    loader = module.training_loader()
    model = module.DigitClassifier(steps=len(loader), with_penalty=True)
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name in ("featurizer", "head"):

        def look(_: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            seen[name] = inputs[0].dtype, output.dtype

        model.get_submodule(name).register_forward_hook(look)
    module.trainer(tmp_path, 1).fit(model, loader)
    assert seen == {"featurizer": (torch.float32, torch.bfloat16), "head": (torch.float32, torch.float32)}


def test_a_continued_transformers_run_is_the_unbroken_one(tmp_path: Path) -> None:
    module = example("loop_transformers")
    unbroken = module.trainer(tmp_path / "unbroken", 2, with_penalty=True)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    unbroken.head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    unbroken.train()
    assert seen[:2] == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]

    first, last = sorted((tmp_path / "unbroken").glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    saved = load_file(first / "model.safetensors")
    assert saved["penalty.average.history"].abs().max() > 0
    assert saved["balance.penalty_norm"] > 0

    continued = module.trainer(tmp_path / "continued", 2, with_penalty=True)
    continued.train(resume_from_checkpoint=str(first))
    for name, value in load_file(last / "model.safetensors").items():
        assert torch.equal(continued.model.state_dict()[name], value), name

    del continued.model.penalty, continued.model.balance
    continued.model.save_pretrained(tmp_path / "shipped")
    _, loading = module.ResNetForImageClassification.from_pretrained(tmp_path / "shipped", output_loading_info=True)
    assert not any(loading.values())


def test_gradient_accumulation_is_refused(tmp_path: Path) -> None:
    module = example("loop_transformers")
    model = module.trainer(tmp_path, 1, with_penalty=True).model
    arguments = module.TrainingArguments(str(tmp_path), gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="not the mean over its parts: gradient_accumulation_steps > 1"):
        module.FishrTrainer(model, arguments, num_domains=2, with_penalty=True)
