"""Only the Dice loss, in a project with its own network: python examples/only_the_dice_loss.py

The loss takes logits and labels as they come: no softmax, no one-hot tensor. Any (N, C, H, W) network will do.
"""

import torch
from torch import nn

from fastunet.losses import DiceCrossEntropyLoss
from fastunet.metrics import SegmentationMetrics

if __name__ == "__main__":
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    loss_function = DiceCrossEntropyLoss(ignore_index=255, class_weights=[0.5, 1, 1], label_smoothing=0.05)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    labels = torch.randint(0, 3, (4, 1, 8, 8)).repeat_interleave(8, 2).repeat_interleave(8, 3)  # (4, 1, 64, 64)
    images = labels.float() + 0.3 * torch.randn(4, 1, 64, 64)
    labels[:, :, :4] = 255  # not annotated
    for step in range(60):
        optimizer.zero_grad()
        loss = loss_function(network(images), labels)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    metrics = SegmentationMetrics(3, ["background", "cell", "border"], ignore_index=255)
    metrics.update(network(images), labels)
    print({name: round(scores["dice"], 3) for name, scores in metrics.compute()["classes"].items()})
