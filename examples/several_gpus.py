"""Train on several GPUs: torchrun --nproc-per-node=2 examples/several_gpus.py

One process for each GPU, or for each core without one. With `sync=True` every process has the Dice loss of the whole
batch, however unevenly the foreground lies; DistributedDataParallel then averages the gradients.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastunet
from fastunet.losses import DiceCrossEntropyLoss


def train(device: torch.device) -> list[float]:
    """The sum of each parameter after 20 steps."""
    torch.manual_seed(0)  # the same weights everywhere
    model = fastunet.UNet(in_channels=1, num_classes=2, width=8, depth=2, dropout=0.0).to(device)
    model = DistributedDataParallel(model)
    loss_function = DiceCrossEntropyLoss(sync=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + dist.get_rank())  # other images in each process
    for step in range(20):
        images = torch.randn(2, 1, 32, 32, device=device)
        labels = images > 0.5  # bool: two classes
        optimizer.zero_grad()
        loss = loss_function(model(images), labels)
        loss.backward()
        optimizer.step()
        if step % 5 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return [p.detach().double().sum().item() for p in model.parameters()]


def main() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    weights = train(torch.device("cuda" if cuda else "cpu"))  # whose model ends here: outliving its group, it may hang
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, weights)
    if dist.get_rank() == 0:
        print("all processes hold the same weights:", all(other == weights for other in gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
