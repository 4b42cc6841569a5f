"""Trainers and tools of others run the network and the losses, with the results of the plain build."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fastunet import UNet, reference
from fastunet.losses import DiceCrossEntropyLoss

SMALL = dict(in_channels=1, num_classes=3, width=4, depth=1, dropout=0.0)


def needed(name: str):
    return pytest.importorskip(name, reason=f"{name} is not installed; it is no part of fastunet[test]")


def network(build=UNet):
    torch.manual_seed(0)
    return build(**SMALL)


def samples(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 8, 12, generator=generator)
    return list(zip(images, torch.randint(0, 3, (count, 8, 12), generator=generator)))


def two_steps(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights after two plain steps on :func:`samples` in pairs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in DataLoader(samples(), batch_size=2):
        optimizer.zero_grad()
        DiceCrossEntropyLoss()(model(images), labels).backward()
        optimizer.step()
    return model.state_dict()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5, msg=name)


def test_lightning_takes_two_steps(tmp_path):
    lightning = needed("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.loss = network(), DiceCrossEntropyLoss()

        def training_step(self, batch, _):
            return self.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(max_steps=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(module, DataLoader(samples(), batch_size=2))
    assert_same(module.model.state_dict(), two_steps(network(reference.UNet)))


def test_accelerate_takes_two_steps():
    accelerate = needed("accelerate")
    model = network()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(samples(), batch_size=2)
    )
    loss_function = DiceCrossEntropyLoss()
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(loss_function(prepared(images), labels))
        optimizer.step()
    assert_same(accelerator.unwrap_model(prepared).state_dict(), two_steps(network(reference.UNet)))


def test_monai_trains_and_slides():
    """Labels as MONAI gives them: (N, 1, H, W) class indices in float32, tensors of its own class."""
    needed("monai")
    needed("ignite")
    from monai.data import MetaTensor
    from monai.engines import SupervisedTrainer

    model = network()
    data = [{"image": MetaTensor(image), "label": MetaTensor(label[None].float())} for image, label in samples()]
    SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=1, train_data_loader=DataLoader(data, batch_size=2), network=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_function=DiceCrossEntropyLoss(),
    ).run()  # fmt: skip
    assert_same(model.state_dict(), two_steps(network(reference.UNet)))


@pytest.mark.parametrize("form", ["model", "frozen"])
def test_monai_sliding_windows_give_the_plain_build_s_logits(form):
    needed("monai")
    from monai.inferers import sliding_window_inference

    model, plain = network().eval(), network(reference.UNet).eval()
    x = torch.randn(1, 1, 21, 26)
    with torch.no_grad():
        predictor = model.freeze() if form == "frozen" else model
        found, want = (sliding_window_inference(x, (8, 12), 3, network, overlap=0.5) for network in (predictor, plain))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_replicas_of_data_parallel_run_on_plain_tensors():
    """What DataParallel's replicas are: copies whose parameters are attributes, no longer registered."""
    model, plain = network(), network(reference.UNet)
    x = samples()[0][0][None]
    results = {}
    for name, build in (("fastunet", model), ("plain", plain)):
        replica = replicate(build)
        assert not list(replica.parameters())
        y = replica(x)
        results[name] = [y, *torch.autograd.grad(y.square().mean(), list(build.parameters()))]
    for found, want in zip(results["fastunet"], results["plain"]):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    parallel = nn.DataParallel(model)
    torch.testing.assert_close(parallel(x), model(x))


def replicate(module: nn.Module) -> nn.Module:
    """One replica by the steps of ``torch.nn.parallel.replicate``, which itself needs several GPUs."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, child in module._modules.items():
        setattr(replica, name, replicate(child))
    for name, parameter in module._parameters.items():
        if parameter is not None:
            copied = parameter.view_as(parameter)  # as Broadcast gives: part of the graph, no Parameter
            setattr(replica, name, copied)
            replica._former_parameters[name] = copied
    return replica


@pytest.mark.parametrize("how", ["activation_checkpointing", "torch.utils.checkpoint"])
def test_checkpointed_blocks_with_hooks_give_the_plain_build_s_gradients(how):
    model, plain = network(), network(reference.UNet)
    calls = {}
    for name, build in (("fastunet", model), ("plain", plain)):
        calls[name] = []
        for part in ("bottleneck", "encoders.0", "decoders.0", "head"):
            build.get_submodule(part).register_forward_hook(
                lambda module, inputs, y, name=name, part=part: (calls[name].append(part), y * 1.25)[1]
            )
            build.get_submodule(part).register_full_backward_hook(
                lambda module, d_inputs, d_outputs: tuple(None if d is None else d * 0.5 for d in d_inputs)
            )
    x = samples()[0][0][None]
    model.activation_checkpointing = how == "activation_checkpointing"
    results = {}
    for name, build in (("fastunet", model), ("plain", plain)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = build(x) if model.activation_checkpointing else checkpoint(build, x, use_reentrant=False)
            results[name] = [y, *torch.autograd.grad(y.square().mean(), list(build.parameters()))]
    for found, want in zip(results["fastunet"], results["plain"]):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert set(calls["fastunet"]) == set(calls["plain"])
