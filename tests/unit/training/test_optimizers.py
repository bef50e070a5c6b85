"""AdamW in 8 bits: near AdamW in 32, with steps below a bf16 weight's last bit taken in the mean."""

import copy

import pytest
import torch

from pose.training.optimizers import make_optimizer, round_stochastically

LR, BETAS = 1e-3, (0.9, 0.999)


@pytest.fixture
def make():
    """The optimizer of a name for parameters."""

    def make_(name, *parameters, lr=LR, weight_decay=0.0):
        if name == "adamw8bit":
            pytest.importorskip("bitsandbytes")
        return make_optimizer(name, [{"params": list(parameters), "weight_decay": weight_decay}], lr, BETAS)

    return make_


def descend(optimizer, parameter, target, steps, grad_dtype=torch.float32):
    """Minimises the squared distance to a target."""
    for step in range(steps):
        torch.manual_seed(step)
        parameter.grad = (parameter.detach().float() - target).to(grad_dtype)
        optimizer.step()


def test_rounding_is_to_a_neighbour_and_exact_in_the_mean():
    torch.manual_seed(0)
    exact = torch.randn(50) * torch.logspace(-20, 20, 50)
    down = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((exact.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    draws = torch.stack([round_stochastically(exact) for _ in range(4000)])
    assert draws.dtype == torch.bfloat16
    draws = draws.float()
    assert ((draws == down) | (draws == up)).all() and (draws == down).any() and (draws == up).any()
    error = (draws.double().mean(0) - exact) / (up - down).abs()
    assert error.abs().max() < 4 * 0.5 / 4000**0.5, "four standard errors"


def test_what_is_no_number_stays_none():
    """Every pattern of NaN: its bits plus the noise may be those of a number."""
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000], dtype=torch.int32).view(torch.float32)
    infinite = torch.tensor([torch.inf, -torch.inf])
    for _ in range(50):
        assert round_stochastically(patterns).isnan().all()
        assert torch.equal(round_stochastically(infinite).float(), infinite)


def test_what_bf16_can_hold_is_not_rounded():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, 1e-30]).to(torch.bfloat16)
    for _ in range(20):
        assert torch.equal(round_stochastically(exact.float()), exact)
    strided = torch.ones(6, 4)[:, ::2]
    assert torch.equal(round_stochastically(strided), strided.to(torch.bfloat16))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("num", [100, 8192])  # states of few elements stay in 32 bits
def test_eight_bits_are_near_thirty_two(make, num, weight_decay):
    torch.manual_seed(0)
    start, target = torch.randn(num), torch.randn(num)
    ends = []
    for name in ("adamw", "adamw8bit"):
        parameter = torch.nn.Parameter(start.clone())
        descend(make(name, parameter, lr=1e-2, weight_decay=weight_decay), parameter, target, 30)
        ends.append(parameter.detach() - start)
    apart = (ends[1] - ends[0]).norm() / ends[0].norm()
    assert apart < (0.1 if num > 4096 else 1e-5)


def test_states_take_a_quarter(make):
    parameter = torch.nn.Parameter(torch.randn(64, 1024))
    optimizer = make("adamw8bit", parameter)
    descend(optimizer, parameter, torch.zeros(64, 1024), 1)
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    num_bytes = sum(tensor.nbytes for tensor in tensors if tensor.numel() > 256)  # but for the codes
    assert num_bytes / parameter.numel() < 2.1


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_steps_below_the_last_bit_are_taken_in_the_mean(make, grad_dtype):
    start = torch.full((64, 128), 1.0, dtype=torch.bfloat16)  # its neighbours are 2^-8 and 2^-7 away
    parameter = torch.nn.Parameter(start.clone())
    storage = parameter.data_ptr()
    if grad_dtype == torch.float32:
        parameter.grad_dtype = torch.float32
    optimizer = make("adamw8bit", parameter, lr=1e-4)
    descend(optimizer, parameter, torch.zeros(64, 128), 20, grad_dtype)
    assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() == storage
    assert parameter.grad.dtype == grad_dtype
    moved = 1.0 - parameter.detach().float().mean()
    assert moved == pytest.approx(20 * 1e-4, rel=0.15)
    nearest = torch.nn.Parameter(start.clone())
    descend(torch.optim.AdamW([nearest], lr=1e-4), nearest, torch.zeros(64, 128), 20, torch.bfloat16)
    assert torch.equal(nearest, start), "rounding to the nearest takes none of them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_its_state_to_the_same_bits(make, tmp_path, dtype):
    torch.manual_seed(0)
    start, target = torch.randn(64, 128).to(dtype), torch.randn(64, 128)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make("adamw8bit", parameter)
    descend(optimizer, parameter, target, 4, dtype)
    torch.save((optimizer.state_dict(), parameter.detach()), tmp_path / "state")
    state, weight = torch.load(tmp_path / "state", weights_only=True)
    again = torch.nn.Parameter(weight.clone())
    other = make("adamw8bit", again)
    other.load_state_dict(copy.deepcopy(state))
    for one, its in ((optimizer, parameter), (other, again)):
        descend(one, its, target, 3, dtype)
    assert torch.equal(parameter, again) and not torch.equal(parameter, weight)
