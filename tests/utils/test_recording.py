"""Recording, with a stand-in for CUDA graphs that replays by calling."""

import pytest
import torch
from torch import nn

from utils.recording import PLAIN_CALLS, Recorded, RecordedPasses


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values)


# ----------------------------------------------------------------------------------------------------------
# Functions


def test_replays_use_the_current_inputs_and_state_in_fixed_buffers(graphs):
    total, addresses = torch.zeros(2), []

    def add(a, b):
        addresses.append((a.data_ptr(), b.data_ptr()))
        total.add_(a * b)
        return total.sum()

    recorded, expected = Recorded(add, "adding"), torch.zeros(2)
    for i in range(7):
        a, b = vector(i, 2.0), vector(1.0, i)
        result = recorded(a, b)
        expected += a * b
        assert result == expected.sum()
        assert torch.equal(total, expected)
        if i == 4:
            total.zero_()  # as when a checkpoint is loaded between two calls
            expected.zero_()
    assert len(graphs) == 1
    assert len(addresses) == 7  # capturing computed nothing
    assert len(set(addresses[:PLAIN_CALLS])) > 1
    assert len(set(addresses[PLAIN_CALLS:])) == 1


def test_the_inputs_are_not_changed(graphs):
    recorded = Recorded(lambda a: a.mul_(2) + 1, "doubling")
    inputs = [vector(float(i)) for i in range(PLAIN_CALLS + 2)]
    results = [recorded(a).item() for a in inputs]
    assert results == [2 * i + 1 for i in range(PLAIN_CALLS + 2)]
    assert inputs[-1] == PLAIN_CALLS + 1


def test_another_shape_is_recorded_anew(graphs):
    recorded = Recorded(torch.sum, "a sum")
    for n in [3] * 6 + [5] * 6:
        assert recorded(torch.ones(n)) == n
    assert len(graphs) == 2


def test_a_function_without_inputs_and_results(graphs):
    total = torch.zeros(())
    recorded = Recorded(lambda: total.add_(1) and None, "counting")
    assert [recorded() for _ in range(5)] == [None] * 5
    assert total == 5
    assert len(graphs) == 1


def test_a_failed_capture_is_reported_once_with_its_reason(no_capture):
    calls, said = [], []

    def work(a):
        calls.append(a.item())
        return a + 1

    recorded = Recorded(work, "a step", said.append)
    assert [recorded(vector(float(i))).item() for i in range(6)] == [1, 2, 3, 4, 5, 6]
    assert calls == [0, 1, 2, 3, 4, 5]
    message = "a step cannot be recorded as a CUDA graph (operation not permitted): slower, with the same results"
    assert said == [message]


# ----------------------------------------------------------------------------------------------------------
# Passes


class Network(nn.Module):
    """Sums its inputs for each sample, and notes the batch sizes."""

    def __init__(self, capacity: int = 1000):
        super().__init__()
        self.sizes: list[int] = []
        self.capacity = capacity

    def forward(self, x, t, condition):
        self.sizes.append(len(x))
        if len(x) > self.capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return x + t[:, None] + 10 * condition


def inputs_of(n: int) -> tuple[dict, torch.Tensor]:
    x, condition = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n))
    t = torch.arange(n)
    return {"x": x, "t": t, "condition": condition}, x + t[:, None] + 10 * condition


def test_all_passes_have_the_first_batchs_size(graphs):
    network = Network()
    passes = RecordedPasses(network)
    for n in (4, 4, 3, 1, 4, 3, 2):
        inputs, expected = inputs_of(n)
        assert torch.equal(passes(inputs["x"], inputs["t"], condition=inputs["condition"]), expected)
    assert set(network.sizes) == {4}
    assert len(graphs) == 1


def test_a_larger_batch_sets_the_size_anew(graphs):
    network = Network()
    passes = RecordedPasses(network)
    for n in (2, 1, 5, 1, 2, 3, 4, 5):
        inputs, expected = inputs_of(n)
        assert torch.equal(passes(*inputs.values()), expected)
    assert network.sizes == [2, 2, *[5] * 6]
    assert len(graphs) == 1


def test_results_are_not_overwritten(graphs):
    passes, results = RecordedPasses(Network()), []
    inputs, expected = inputs_of(2)
    for scale in range(8):
        results.append(passes(scale * inputs["x"], inputs["t"], inputs["condition"]))
    for scale, result in enumerate(results):
        torch.testing.assert_close(result, expected + (scale - 1) * inputs["x"])


def test_a_network_is_accelerated_after_its_first_pass(graphs):
    network, fast, seen = Network(), Network(), []

    def accelerate(given, call):
        seen.append((given is network, len(network.sizes)))
        call(fast)
        return fast

    passes = RecordedPasses(network, accelerate)
    for n in (3, 3, 2, 7):  # the last one in three parts
        inputs, expected = inputs_of(n)
        assert torch.equal(passes(inputs["x"], inputs["t"], condition=inputs["condition"]), expected)
    assert seen == [(True, 1)]
    assert network.sizes == [3]
    assert fast.sizes == [3] * 6


def test_a_batch_that_does_not_fit_sets_no_size(graphs):
    network = Network(capacity=2)
    passes = RecordedPasses(network)
    big, small = inputs_of(4), inputs_of(2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        passes(*big[0].values())
    assert torch.equal(passes(*small[0].values()), small[1])
    assert passes.size == 2
    network.capacity = 1  # another process takes memory
    with pytest.raises(torch.cuda.OutOfMemoryError):
        passes(*small[0].values())
    one = inputs_of(1)
    assert torch.equal(passes(*one[0].values()), one[1])
