"""`similarity_weights` against a float64 oracle, channel by channel in Python, and against what it must add up to."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, make, to_float64
from fastcam._testing.relevance import assert_elementwise, assert_refuses_grad, assert_repeatable

OP = torch.ops.fastcam.similarity_weights.default
TERMS = ("cosine", "dot", "neg_sq", "cross", "inverse")
WEIGHTINGS = ("minmax", "ratio", "raw")
SWITCHES = list(itertools.product(TERMS, WEIGHTINGS, (False, True)))
LAYOUTS_2D = ("contiguous", "transposed", "sliced columns", "sliced batch")
# On both sides of what leaves read at a time.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 257, 1000)

sw = ops.similarity_weights


def length(x: list[float]) -> float:
    return max(math.sqrt(math.fsum(a * a for a in x)), 1e-12)


def contribution(u: float, v: float, term: str, lengths: float) -> float:
    if term == "cosine":
        return u * v / lengths
    if term == "neg_sq":
        return -((u - v) * (u - v))
    if term == "inverse":
        return 1.0 / (1.0 + abs(u - v))
    return u * v if term == "dot" else 2.0 * u * v


def oracle(first, second, term="cosine", weighting="minmax", dissimilarity=False):
    """Contributions, weights, total of finite embeddings, and how far rounding in float64 may move each."""
    u, v = to_float64(first).tolist(), to_float64(second).tolist()
    rows = max(len(u), len(v)) if u and v else 0
    found = [[], [], [], [], []]
    for b in range(rows):
        x, y = u[b % len(u)], v[b % len(v)]
        lengths = length(x) * length(y) if term == "cosine" else 1.0
        c = [contribution(p, q, term, lengths) for p, q in zip(x, y, strict=True)]
        c = [-p for p in c] if dissimilarity else c
        t, size = math.fsum(c), math.fsum(map(abs, c))
        low, high = min(c), max(c)
        if weighting == "minmax":
            w = [1.0 if low == high else (p - low) / (high - low) for p in c]
            wobble = 0.0 if low == high else max(map(abs, c)) / (high - low)
        else:
            w = [p / abs(t) if weighting == "ratio" and t != 0 else p for p in c]
            wobble = max(map(abs, w)) * size / abs(t) if weighting == "ratio" and t != 0 else 0.0
        for into, value in zip(found, (c, w, t, size, [wobble] * len(c)), strict=True):
            into.append(value)
    shape = (rows, first.shape[1])
    return [np.array(x, dtype=np.float64).reshape(shape if i in (0, 1, 4) else rows) for i, x in enumerate(found)]


def check(first, second, *switches) -> None:
    result = sw(first, second, *switches)
    c, w, t, size, wobble = oracle(first, second, *switches)
    dtype = torch.promote_types(first.dtype, torch.float32)
    assert all(x.dtype == dtype and x.is_contiguous() for x in result)
    # What the last rounding adds, and what comes from rounding to float64 alone.
    share = 32 * torch.finfo(torch.float64).eps / torch.finfo(dtype).eps
    assert_elementwise(result[0], c)
    assert_elementwise(result[1], w, np.abs(w) + share * wobble)
    assert_elementwise(result[2], t, np.abs(t) + share * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS_2D)
def test_layouts_and_dtypes(backend, layout, dtype):
    u, v = make((3, 37), dtype, 1, layout), make((3, 37), dtype, 2, layout)
    for switches in SWITCHES:
        check(u, v, *switches)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_lengths(backend, term, dtype):
    for channels in LENGTHS:
        for weighting in WEIGHTINGS:
            check(make((2, channels), dtype, channels), make((2, channels), dtype, channels + 1), term, weighting)


U, V = make((5, 96), torch.float64, 1), make((5, 96), torch.float64, 2)


def test_contributions_add_up_to_the_similarity(backend):
    wanted = {
        "cosine": functional.cosine_similarity(U, V),
        "dot": (U * V).sum(1),
        "neg_sq": -(torch.cdist(U[:, None], V[:, None])[:, 0, 0] ** 2),
        "cross": (U + V).norm(dim=1) ** 2 - U.norm(dim=1) ** 2 - V.norm(dim=1) ** 2,
        "inverse": (1 / (1 + (U - V).abs())).sum(1),
    }
    for term, total in wanted.items():
        contributions, _, found = sw(U, V, term)
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(contributions.sum(1), total)
        opposite = sw(U, V, term, "minmax", True)
        assert torch.equal(opposite[0], -contributions)
        assert torch.equal(opposite[2], -found)


@pytest.mark.parametrize("term", TERMS)
def test_ratios_add_up_to_the_sign_of_the_total(backend, term):
    for dissimilarity in (False, True):
        _, weights, total = sw(U, V, term, "ratio", dissimilarity)
        torch.testing.assert_close(weights.sum(1), total.sign())


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minmax_weights_are_zero_to_one(backend, dtype, term):
    u, v = U.to(dtype), V.to(dtype)
    for dissimilarity in (False, True):
        contributions, weights, _ = sw(u, v, term, "minmax", dissimilarity)
        assert torch.equal(weights.amin(1), torch.zeros(5, dtype=weights.dtype))
        assert torch.equal(weights.amax(1), torch.ones(5, dtype=weights.dtype))
        assert torch.equal(weights.gather(1, contributions.argmax(1, keepdim=True)), weights.amax(1, keepdim=True))
    torch.testing.assert_close(sw(u, v, term)[1], 1 - weights)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("term", TERMS)
def test_neither_embedding_comes_first(backend, term, weighting):
    for a, b in zip(sw(U, V, term, weighting), sw(V, U, term, weighting), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_cosine_is_blind_to_scale(backend):
    for weighting in WEIGHTINGS:
        for a, b in zip(sw(U, V, "cosine", weighting), sw(3 * U, 0.01 * V, "cosine", weighting), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_weights_of_squared_distance_are_blind_to_common_scale_and_place(backend):
    weights = sw(U, V, "neg_sq")[1]
    torch.testing.assert_close(sw(7 * U, 7 * V, "neg_sq")[1], weights)
    torch.testing.assert_close(sw(U - 1.5, V - 1.5, "neg_sq")[1], weights)
    torch.testing.assert_close(sw(7 * U, 7 * V, "neg_sq", "ratio")[1], sw(U, V, "neg_sq", "ratio")[1])


def test_a_dead_channel_contributes_nothing(backend):
    u = U.clone()
    u[:, 3] = 0
    for term in ("cosine", "dot", "cross"):
        for weighting in ("ratio", "raw"):
            contributions, weights, _ = sw(u, V, term, weighting)
            assert contributions[:, 3].count_nonzero() == weights[:, 3].count_nonzero() == 0
    both = V.clone()
    both[:, 3] = 0
    without = [x for x in range(96) if x != 3]
    for term in ("cosine", "dot", "neg_sq", "cross"):
        whole, rest = sw(u, both, term, "ratio"), sw(u[:, without], both[:, without], term, "ratio")
        torch.testing.assert_close(whole[1][:, without], rest[1])
        torch.testing.assert_close(whole[2], rest[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_embeddings(backend, dtype):
    u = U.to(dtype)
    for weighting, expected in (("minmax", 1), ("ratio", 0), ("raw", 0)):
        contributions, weights, total = sw(u, u, "neg_sq", weighting)
        assert contributions.count_nonzero() == total.count_nonzero() == 0
        assert (weights == expected).all()
    assert all((x == y).all() for x, y in zip(sw(u, u, "inverse"), (1, 1, 96), strict=True))
    torch.testing.assert_close(sw(u, u)[2], torch.ones_like(sw(u, u)[2]))


@pytest.mark.parametrize("term", ["cosine", "dot", "cross"])
def test_zero_embedding(backend, term):
    for u, v in ((torch.zeros_like(U), V), (U, torch.zeros_like(V)), (torch.zeros(2, 7), torch.zeros(2, 7))):
        for weighting, expected in (("minmax", 1), ("ratio", 0), ("raw", 0)):
            contributions, weights, total = sw(u, v, term, weighting)
            assert contributions.count_nonzero() == total.count_nonzero() == 0
            assert (weights == expected).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orthogonal_embeddings_keep_their_contributions(backend, dtype):
    u = torch.tensor([[1.0, 2.0, -1.0, 0.0]] * 2, dtype=dtype)
    v = torch.tensor([[2.0, -1.0, 0.0, 5.0], [0.0, 0.0, 0.0, 5.0]], dtype=dtype)
    for term in ("dot", "cross"):
        contributions, weights, total = sw(u, v, term, "ratio")
        assert total.count_nonzero() == 0
        assert torch.equal(weights, contributions)
    assert sw(u, v, "dot", "ratio")[1].tolist() == [[2, -2, 0, 0], [0, 0, 0, 0]]
    assert sw(u, v, "dot")[1].tolist() == [[1, 0, 0.5, 0.5], [1, 1, 1, 1]]


@pytest.mark.parametrize("term", TERMS)
def test_one_channel(backend, term):
    u, v = torch.tensor([[2.0], [-3.0], [0.0]]), torch.tensor([[5.0], [5.0], [5.0]])
    contributions, weights, total = sw(u, v, term)
    assert torch.equal(weights, torch.ones(3, 1))
    assert torch.equal(contributions[:, 0], total)
    assert torch.equal(sw(u, v, term, "ratio")[1], contributions.sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_embeddings_of_any_magnitude(backend, dtype):
    """Squares and products that float32 does not hold, as long as results are within it."""
    u, v = U.float(), V.float()
    sizes = (1.0, 2.0**-8) if dtype == torch.float16 else (2.0**84, 2.0**-34)
    for a, b in itertools.product(sizes, sizes):
        one, other = (u * a).to(dtype), (v * b).to(dtype)
        check(one, other, "cosine")
        cosine = functional.cosine_similarity(one.double(), other.double(), eps=1e-12)
        torch.testing.assert_close(sw(one, other)[2], cosine.float())
    if dtype != torch.float16:
        big, small = (u * 2.0**84).to(dtype), (u * 2.0**-84).to(dtype)
        check(big, (v * 2.0**-84).to(dtype), "dot", "ratio")
        for x in (big, small):
            for term in ("dot", "neg_sq"):  # the contributions themselves overflow or vanish, their weights do not
                assert torch.equal(sw(x, x.flip(1), term)[1], sw(u.to(dtype), u.to(dtype).flip(1), term)[1])


def test_length_is_clamped(backend):
    u = torch.full((1, 4), 1e-13)
    contributions, weights, total = sw(u, torch.ones(1, 4))
    torch.testing.assert_close(contributions, torch.full((1, 4), 0.05))
    torch.testing.assert_close(total, torch.tensor([0.2]))
    assert torch.equal(weights, torch.ones(1, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(backend, dtype, term, value):
    for channels, at in ((5, 4), (70, 0), (70, 33), (70, 69)):
        u, v = make((4, channels), dtype, 1), make((4, channels), dtype, 2)
        clean = {weighting: sw(u, v, term, weighting) for weighting in WEIGHTINGS}
        u[1, at] = v[2, at] = value
        for weighting in WEIGHTINGS:
            contributions, weights, total = sw(u, v, term, weighting)
            if weighting == "minmax":
                assert weights[1:3].isnan().all()
            if math.isnan(value):
                assert contributions[1:3, at].isnan().all()
                assert total[1:3].isnan().all()
            for a, b in zip((contributions, weights, total), clean[weighting], strict=True):
                assert torch.equal(a[::3], b[::3])


def test_equal_infinities_spoil_the_row(backend):
    for term in TERMS:
        u, v = U.clone(), V.clone()
        u[0, 0] = v[0, 0] = math.inf
        assert sw(u, v, term)[1][0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_embedding_goes_with_every_row(backend, dtype):
    u, v = make((1, 70), dtype, 1), make((9, 70), dtype, 2)
    for term, weighting in itertools.product(TERMS, WEIGHTINGS):
        for first, second in ((u, v), (v, u)):
            given = sw(first, second, term, weighting)
            expanded = torch.broadcast_tensors(first, second)
            for both in (expanded, [x.clone(memory_format=torch.contiguous_format) for x in expanded]):
                assert all(torch.equal(a, b) for a, b in zip(given, sw(*both, term, weighting), strict=True))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(backend, dtype, first, second):
    for switches in SWITCHES:
        result = sw(torch.ones(first, 5, dtype=dtype), torch.ones(second, 5, dtype=dtype), *switches)
        assert [x.shape for x in result] == [(0, 5), (0, 5), (0,)]
        assert all(x.dtype == torch.promote_types(dtype, torch.float32) for x in result)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("channels", [33, 512])
def test_batch_is_its_rows(backend, channels, term):
    if backend == "reference":
        pytest.skip("PyTorch's own kernels make no such promise")
    u, v = make((40, channels), torch.float32, 1), make((40, channels), torch.float32, 2)
    for a, b in ((u, v), (u[3:4], v), (u.t().contiguous().t(), v), (u[::2], v[1::2]), (u[:, 1:], v[:, :-1])):
        together = sw(a, b, term)
        alone = [sw(a[i % len(a)][None], b[i : i + 1], term) for i in range(len(b))]
        assert all(torch.equal(x, torch.cat(y)) for x, y in zip(together, zip(*alone, strict=True), strict=True))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_same_bits_on_every_run_and_thread_count(backend, weighting):
    u, v = make((200, 513), torch.float32, 1), make((1, 513), torch.float32, 2)
    assert_repeatable(lambda: sw(u, v, "cosine", weighting))


def test_results_are_fresh(backend):
    for weighting in WEIGHTINGS:
        result = sw(U, V, "dot", weighting)
        assert len({x.untyped_storage().data_ptr() for x in (*result, U, V)}) == 5


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    """16 GiB of results, whose last row lies beyond 2^31."""
    if backend == "reference":
        pytest.skip("would need several times the memory")
    u = torch.ones(1, dtype=torch.bfloat16).expand(2**21 + 2, 1024)
    v = u[:1].clone()
    v[0, -1] = 3
    contributions, weights, total = sw(u, v, "dot")
    assert contributions[-1, -2:].tolist() == [1, 3]
    assert weights[-1, -2:].tolist() == [0, 1]
    assert total[-1] == 1026


X = torch.zeros(3, 5)
ERRORS = [
    (([0.0], X), TypeError, "first must be a torch.Tensor, got list"),
    ((X, None), TypeError, "second must be a torch.Tensor, got NoneType"),
    ((X.long(), X.long()), TypeError, "first must be float64, .* got torch.int64"),
    ((X.to_sparse(), X), TypeError, "first must be a strided tensor, got layout torch.sparse_coo"),
    ((X, X.to_sparse()), TypeError, "second must be a strided tensor, got layout torch.sparse_coo"),
    ((X, X.half()), TypeError, "second must be torch.float32 like the first, got torch.float16"),
    ((X.half(), X), TypeError, "second must be torch.float16 like the first, got torch.float32"),
    ((X, X.to("meta")), ValueError, "second is on meta, first on cpu; both must be on one device"),
    ((X[0], X[0]), ValueError, r"first must be \(B,D\), got 1 dimensions: \(5,\)"),
    ((X[None], X[None]), ValueError, r"first must be \(B,D\), got 3 dimensions: \(1, 3, 5\)"),
    ((X[:, :0], X[:, :0]), ValueError, r"first needs at least one channel, got \(B,D\) = \(3, 0\)"),
    ((X, X[:2]), ValueError, r"second must be \(3, 5\) like the first, or one of the two have batch 1, got \(2, 5\)"),
    ((X, X[:0]), ValueError, r"second must be \(3, 5\) like the first, .* got \(0, 5\)"),
    ((X, X[:, :1]), ValueError, r"second must be \(3, 5\) like the first, .* got \(3, 1\)"),
    ((X, X[0]), ValueError, r"second must be \(3, 5\) like the first, .* got \(5,\)"),
    ((X, X[0, 0]), ValueError, r"second must be \(3, 5\) like the first, .* got \(\)"),
    ((X, X, "cosin"), ValueError, "unknown term 'cosin', expected one of cosine, dot, neg_sq, .*mean 'cosine'"),
    ((X, X, "dot", "min"), ValueError, "unknown weighting 'min', expected one of minmax, .*mean 'minmax'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(arguments, error, message):
    with pytest.raises(error, match="similarity_weights: " + message):
        sw(*arguments)


def test_bare_op_checks_too():
    shapes = [(X[0], X[0]), (X[:, :0], X[:, :0]), (X, X[:2]), (X, X[:, :1]), (X, X[0])]
    for arguments in (*shapes, (X.long(), X.long()), (X, X.half()), (X, X, "cosin"), (X, X, "dot", "min")):
        with pytest.raises((ValueError, TypeError)):
            OP(*arguments)


def test_inputs_that_require_grad_are_refused(backend):
    for call in (sw, OP):
        assert_refuses_grad(call, "similarity_weights", {"first": X, "second": X})


@pytest.mark.parametrize(("layout", "dtype"), [*zip(LAYOUTS_2D, DTYPES, strict=True)])
def test_opcheck(layout, dtype):
    u, v = make((3, 7), dtype, 1, layout), LAYOUTS[layout](make((3, 7), dtype, 2))
    for weighting in WEIGHTINGS:
        torch.library.opcheck(OP, (u, v, "inverse", weighting, True))
    torch.library.opcheck(OP, (u[:1], v))
    torch.library.opcheck(OP, (u, v[:1]))
    torch.library.opcheck(OP, (u[:0], v[:1]))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(sw, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, queries in ((2, 1), (3, 1), (3, 3), (4, 4)):
        u, v = make((queries, 9), torch.float32, 1), make((rows, 9), torch.float32, 2)
        assert all(torch.equal(a, b) for a, b in zip(compiled(u, v), sw(u, v), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(compiled(v, u), sw(v, u), strict=True))
