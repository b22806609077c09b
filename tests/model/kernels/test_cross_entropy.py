"""The fused cross-entropy against its reference: shapes, precisions, extremes; Triton compiled and
run without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

from ibeton.model.config import MOST_GLOBAL
from ibeton.model.kernels.head.cross_entropy import CHUNK, cross_entropy, cross_entropy_reference

# By format: of the loss, and of the gradient's largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [  # student rows, teacher rows, prototypes, targets a row
    *((1, 1, 1, 1), (3, 2, 2, 1), (5, 7, 3, 2), (17, 4, 96, 3), (7, 7, 1000, 1)),
    *((2, 3, 4097, 2), (1, 2, 8192, 2), (3, 1, 65_536, 1), (0, 3, 64, 1), (4, 4, 31, 5)),
]


def random_rows(rows, teachers, prototypes, targets, dtype=torch.float32, spread=4.0, seed=0):
    """Arguments with some targets missing and some weights zero."""
    g = torch.Generator().manual_seed(seed)
    student = (spread * torch.randn(rows, prototypes, generator=g)).to(dtype)
    teacher = (spread * torch.randn(teachers, prototypes, generator=g)).to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    center = torch.randn(prototypes, generator=g).to(wide)
    pairs = torch.randint(-1, teachers, (rows, targets), generator=g)
    weight = torch.rand(rows, generator=g).to(wide) * (torch.rand(rows, generator=g) < 0.8)
    return student, teacher, center, pairs, weight


def value_and_gradient(function, arguments, temps=(0.1, 0.07), scale=1.0):
    student = arguments[0].clone().requires_grad_()
    loss = function(student, *arguments[1:], *temps)
    (scale * loss).backward()
    return loss.detach(), student.grad


def test_as_many_views_as_the_config_allows_do_not_overflow_in_fp16():
    """All views agree on a prototype, and the student on another."""
    student, teacher = torch.zeros(1, 64).half(), torch.zeros(MOST_GLOBAL, 64).half()
    student[0, 1], teacher[:, 0] = 60.0, 60.0
    pairs = torch.arange(MOST_GLOBAL).unsqueeze(0)
    arguments = student, teacher, torch.zeros(64), pairs, torch.ones(1)
    _, gradient = value_and_gradient(cross_entropy, arguments)
    assert gradient.isfinite().all()
    assert gradient[0, 0].item() == pytest.approx(-MOST_GLOBAL / 0.1, rel=1e-3)


def assert_same(arguments, dtype, temps=(0.1, 0.07), scale=1.0):
    loss, gradient = value_and_gradient(cross_entropy, arguments, temps, scale)
    expected, expected_gradient = value_and_gradient(
        cross_entropy_reference, arguments, temps, scale
    )
    assert loss.dtype == expected.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    # The loss is computed from the same rounded logits: only the gradient is rounded again.
    torch.testing.assert_close(loss, expected, rtol=min(TOLERANCE[dtype], 1e-5), atol=1e-6)
    if len(gradient):
        error = (gradient.double() - expected_gradient.double()).abs().max()
        assert error <= TOLERANCE[dtype] * expected_gradient.double().abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(shape, dtype):
    assert_same(random_rows(*shape, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_more_rows_than_a_chunk(dtype):
    rows = 2 * (CHUNK // 8192) + 5
    assert_same(random_rows(rows, 20, 8192, 2, dtype=dtype), dtype)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e3, 1.5e4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_extreme_logits_stay_finite(spread, dtype):
    """15,000 over a temperature of 0.04 is 375,000: exponentials must not see that."""
    arguments = random_rows(6, 5, 300, 2, dtype=dtype, spread=spread)
    arguments = (arguments[0].clamp(-6e4, 6e4), arguments[1].clamp(-6e4, 6e4), *arguments[2:])
    assert_same(arguments, dtype, temps=(0.1, 0.04))


def test_rows_without_targets_or_weight_count_nothing():
    student, teacher, center, pairs, weight = random_rows(4, 3, 64, 2)
    pairs[1], weight[:] = -1, torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss, gradient = value_and_gradient(cross_entropy, (student, teacher, center, pairs, weight))
    assert not gradient[1:3].any()
    assert gradient[0].any()
    kept = [0, 3]
    alone, _ = value_and_gradient(
        cross_entropy, (student[kept], teacher, center, pairs[kept], weight[kept])
    )
    torch.testing.assert_close(loss, alone)


def test_small_gradients_survive_fp16_under_loss_scaling():
    """Weights of 1e-6 make gradients of 1e-9, below fp16; times the loss scale they are in range,
    and must not have been lost before it came."""
    student, teacher, center, pairs, _ = random_rows(8, 8, 8192, 1, torch.float16, spread=0.1)
    weight = torch.full((8,), 1e-6)
    arguments = (student, teacher, center, pairs.clamp(min=0), weight)
    _, gradient = value_and_gradient(cross_entropy, arguments, scale=65536.0)
    exact = (student.double(), teacher.double(), center.double(), *arguments[3:])
    _, expected = value_and_gradient(cross_entropy_reference, exact, scale=65536.0)
    error = (gradient.double() - expected).abs()
    assert (error <= 2e-3 * expected.abs() + 6e-8).all()  # half a subnormal step


def test_gradient_by_differences():
    arguments = random_rows(3, 2, 5, 2, dtype=torch.float64)
    student = arguments[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: cross_entropy(s, *arguments[1:], 0.1, 0.07), student, atol=1e-6
    )


def test_backward_twice_gives_the_same():
    arguments = random_rows(3, 2, 50, 1)
    student = arguments[0].requires_grad_()
    loss = cross_entropy(student, *arguments[1:], 0.1, 0.07)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])


def test_misfits_are_refused():
    student, teacher, center, pairs, weight = random_rows(4, 3, 16, 2)
    with pytest.raises(ValueError, match="expected the same number of prototypes"):
        cross_entropy(student, teacher[:, :8], center, pairs, weight, 0.1, 0.07)
    with pytest.raises(ValueError, match="expected one entry per row"):
        cross_entropy(student, teacher, center, pairs[:2], weight, 0.1, 0.07)


def in_subprocess(script: str, **environment: str) -> str:
    """Output of a Python process of its own: Triton's interpreter is chosen at import."""
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


INTERPRET = """
import torch
from ibeton.model.kernels.head.class_metrics import class_metrics, class_metrics_reference
from ibeton.model.kernels.head.cross_entropy import rows_by_chunk, rows_by_triton
from test_cross_entropy import SHAPES, TOLERANCE, assert_same, random_rows

for dtype in DTYPES:
    for i, shape in enumerate([*SHAPES, (5, 5, 300, 2)]):
        spread = 1.5e4 if i == len(SHAPES) else 4.0
        student, teacher, center, pairs, weight = random_rows(*shape, dtype=dtype, spread=spread)
        student, teacher = student.clamp(-6e4, 6e4), teacher.clamp(-6e4, 6e4)
        lift = 4096.0 if dtype is torch.float16 else 1.0
        temp = torch.tensor(0.07, dtype=torch.float64) if i % 2 else 0.07
        rest = (student, teacher, center, pairs, weight.double(), 0.1, temp, lift)
        loss, difference = rows_by_triton(*rest, True)
        expected, expected_difference = rows_by_chunk(*rest, True)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
        bound = TOLERANCE[dtype] * (1 + expected_difference.abs().float())
        assert ((difference - expected_difference).abs() <= lift * bound).all(), (shape, dtype)
        alone, nothing = rows_by_triton(*rest, False)
        assert nothing is None and torch.equal(alone, loss)
        if len(student):
            assert_same((student, teacher, center, pairs, weight), dtype)
        if len(student) == len(teacher):
            one = torch.arange(len(student)).unsqueeze(1)
            found = rows_by_triton(student, teacher, center, None, *rest[4:], True)
            for a, b in zip(found, rows_by_triton(student, teacher, center, one, *rest[4:], True)):
                assert torch.equal(a, b)
        if not len(student):
            continue
        views, one = 2 if len(teacher) % 2 == 0 else 1, student[:1].expand(2 * len(teacher), -1)
        student = torch.cat([student, one])
        mine, reference = (
            metrics(teacher, student, center, temp, views)
            for metrics in (class_metrics, class_metrics_reference)
        )
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=2e-5)
print("same")
"""


@pytest.mark.parametrize(
    "dtypes", ["float16", pytest.param("float32, torch.bfloat16", marks=pytest.mark.slow)]
)
def test_triton_interpreted_equals_the_chunks(dtypes):
    script = INTERPRET.replace("DTYPES", f"(torch.{dtypes},)")
    assert in_subprocess(script, TRITON_INTERPRET="1").strip() == "same"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cuda(shape, dtype):
    arguments = tuple(t.cuda() for t in random_rows(*shape, dtype=dtype))
    assert_same(arguments, dtype)
