"""Every per-sample quantity from one backward pass of an unmodified model."""

import torch
from torch import nn
from torch.nn import functional as F

import samplewise as sw

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 10))
images, labels = torch.randn(5, 1, 8, 8), torch.tensor([3, 1, 4, 1, 5])

with sw.record(model) as rec:
    rec.backward(F.cross_entropy(model(images), labels, reduction="none"))

print(rec.norms())  # one norm per sample
print(rec.grads()["0.weight"].shape)  # (n, *shape)
print(rec.clipped_sum(max_grad_norm=1.0)["3.bias"])  # what a private step needs
print(rec.gram()[0])  # similarity of sample 0 to all
print(rec.coverage())
