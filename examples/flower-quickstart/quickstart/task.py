"""A small model, and data that is made here so that nothing has to be downloaded."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two layers with a batch normalisation, whose counter is an integer that every strategy must carry along."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, points: Tensor) -> Tensor:
        """(B, 2) points to (B, 2) logits."""
        return self.layers(points)


def load_data(seed: int, examples: int = 128) -> DataLoader:
    """Points of the plane, labelled by whether they lie inside the unit circle."""
    generator = torch.Generator().manual_seed(seed)
    points = 1.2 * torch.randn(examples, 2, generator=generator)
    return DataLoader(TensorDataset(points, (points.norm(dim=1) < 1).long()), batch_size=16)


def train(net: nn.Module, loader: DataLoader, epochs: int, learning_rate: float) -> float:
    """Trains in place; the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9)
    net.train()
    for _ in range(epochs):
        total = 0.0
        for points, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(points), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(loader)


def accuracy(net: nn.Module, loader: DataLoader) -> float:
    """Share of points that are classified right."""
    net.eval()
    with torch.no_grad():
        right = sum(int((net(points).argmax(1) == labels).sum()) for points, labels in loader)
    return right / len(loader.dataset)
