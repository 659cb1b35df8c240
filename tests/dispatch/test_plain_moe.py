"""The layer of docs/plain_moe.py on four ranks learns what it learns on one process without a dispatcher."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from docs.plain_moe import expert, plain_moe
from hiermoe.ranks.launch import run_ranks
from tests.dispatch.worlds import DEADLINE, TIMEOUT, World

WORLD = World((2, 4))
HIDDEN, WIDTH, EXPERTS, TOPK, TOKENS, STEPS, RATE = 6, 10, 8, 3, 12, 12, 0.5


class OneProcess(nn.Module):
    """All experts, and every token through each of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleDict({str(e): expert(HIDDEN, WIDTH) for e in range(EXPERTS)})
        self.double()

    def forward(self, x_NM: Tensor) -> Tensor:
        logits_NK, ids_NK = self.router(x_NM).topk(TOPK)
        weights_NE = torch.zeros(len(x_NM), EXPERTS, dtype=x_NM.dtype).scatter(1, ids_NK, logits_NK.softmax(dim=1))
        return torch.stack(
            [run(x_NM) * w[:, None] for run, w in zip(self.experts.values(), weights_NE.T, strict=True)]
        ).sum(0)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, target = (torch.randn(WORLD.num_ranks * TOKENS, HIDDEN, generator=generator).double() for _ in range(2))
    return x, target


def loss_of(layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """This part's share of the mean over all tokens."""
    return F.mse_loss(layer(x), target, reduction="sum") / (WORLD.num_ranks * TOKENS * HIDDEN)


def train(rank: int, system: str) -> tuple[list[float], dict[str, Tensor]]:
    layer = plain_moe(system, WORLD.cluster, HIDDEN, WIDTH, EXPERTS, TOPK).double()
    start = OneProcess().state_dict()
    layer.load_state_dict({name: start[name] for name in layer.state_dict()})
    optimizer = torch.optim.SGD(layer.parameters(), RATE)
    mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(layer, *(part[mine] for part in data()))
        loss.backward()
        layer.sum_router_gradients()
        optimizer.step()
        losses.append(loss.item())
    return losses, layer.state_dict()


@pytest.mark.parametrize("system", ["hd2", "h1"])
def test_a_plain_layer_on_four_ranks_learns_what_one_process_learns(system: str) -> None:
    reference = OneProcess()
    optimizer = torch.optim.SGD(reference.parameters(), RATE)
    expected = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(reference, *data())
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    results = run_ranks(train, WORLD.num_ranks, (system,), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)
    losses = [sum(shares) for shares in zip(*(losses for losses, _ in results), strict=True)]
    assert losses == pytest.approx(expected, rel=1e-12)
    assert losses[-1] < 0.9 * losses[0]
    found = [name for _, parameters in results for name in parameters if name.startswith("experts")]
    assert sorted(found) == sorted(name for name in reference.state_dict() if name.startswith("experts"))
    for _, parameters in results:
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, reference.state_dict()[name], rtol=1e-10, atol=1e-12)
