"""svel::bank_push_ against its definition: rows pushed one by one, in order."""

import pytest
import torch
from kernel_cases import offset_by_one, with_gaps


def by_definition(refs, counts, heads, values, labels, all_to_last=False):
    refs, counts, heads = refs.clone(), counts.clone(), heads.clone()
    capacity = refs.shape[1]
    for value, y in zip(values, labels.tolist(), strict=True):
        if 0 <= y < refs.shape[0] and capacity:
            refs[y, heads[y]] = value.to(refs.dtype)
            heads[y] = (heads[y] + 1) % capacity
            counts[y] = torch.clamp(counts[y] + 1, max=capacity)
    if all_to_last:
        last = torch.full_like(labels, len(refs) - 1)
        return by_definition(refs, counts, heads, values, last)
    return refs, counts, heads


def make_bank(groups, capacity, sample, rng, dtype=torch.float32, index=torch.int64):
    refs = torch.randint(-100, 100, (groups, capacity, *sample), generator=rng).to(dtype)
    heads = torch.randint(max(capacity, 1), (groups,), generator=rng).to(index)
    counts = torch.randint(capacity + 1, (groups,), generator=rng).to(index)
    return refs, counts, heads


def push(implementation, bank, values, labels, **options):
    """The bank after one call, on the CPU; the bank itself is left as it was."""
    moved = [b.clone().to(implementation.device) for b in bank]
    result = implementation.on_device("bank_push_")(
        *moved, values.to(implementation.device), labels.to(implementation.device), **options
    )
    assert result is None
    return [m.cpu() for m in moved]


def check(implementation, bank, values, labels, **options):
    for got, expected in zip(
        push(implementation, bank, values, labels, **options),
        by_definition(*bank, values, labels, **options),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_random_sequences(implementation, seed, index):
    """Several calls in a row, on banks and batches of random sizes."""
    rng = torch.Generator().manual_seed(seed)
    groups, capacity, d = (int(torch.randint(1, high, (), generator=rng)) for high in (6, 9, 40))
    bank = make_bank(groups, capacity, (d,), rng, index=index)
    expected = bank
    for _ in range(3):
        n = int(torch.randint(0, 30, (), generator=rng))
        values, labels = torch.randn(n, d, generator=rng), torch.randint(groups, (n,), generator=rng)
        bank, expected = push(implementation, bank, values, labels), by_definition(*expected, values, labels)
        assert all(torch.equal(a, b) for a, b in zip(bank, expected, strict=True))


@pytest.mark.parametrize("n", [3, 4, 5, 8, 9, 150])
def test_one_label_beyond_the_capacity(implementation, rng, n):
    check(implementation, make_bank(3, 4, (5,), rng), torch.randn(n, 5, generator=rng), torch.full((n,), 1))


@pytest.mark.parametrize("capacity", [1, 2, 64])
def test_many_rows_of_few_labels(implementation, rng, capacity):
    labels = torch.randint(2, (200,), generator=rng)
    check(implementation, make_bank(2, capacity, (3,), rng), torch.randn(200, 3, generator=rng), labels)


@pytest.mark.parametrize("n", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("d", [5, 8])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_all_to_the_last_group_too(implementation, rng, n, d, index):
    """As a second call would do it with the last group's label in every row; labels are those of the other groups."""
    bank, labels = make_bank(4, 6, (d,), rng, torch.float16, index), torch.randint(3, (n,), generator=rng)
    check(implementation, bank, torch.randn(n, d, generator=rng), labels, all_to_last=True)
    indices = make_bank(4, 6, (), rng, torch.int64, index)
    check(implementation, indices, torch.arange(n) + 2**40, labels, all_to_last=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(implementation, rng, dtype, values_dtype):
    if implementation.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16; a GPU rounds")
    values = torch.randn(7, 2, 3, generator=rng).to(values_dtype)
    check(implementation, make_bank(3, 4, (2, 3), rng, dtype), values, torch.randint(3, (7,), generator=rng))


@pytest.mark.parametrize("sample", [(), (1,), (1030,), (2, 3, 5)], ids=str)
def test_int64_indices_and_sample_shapes(implementation, rng, sample):
    labels = torch.randint(3, (7,), generator=rng)
    check(implementation, make_bank(3, 4, sample, rng), torch.randn(7, *sample, generator=rng), labels)
    values = torch.randint(2**40, (7, *sample), generator=rng)
    check(implementation, make_bank(3, 4, sample, rng, torch.int64), values, labels)


@pytest.mark.parametrize(
    ("groups", "capacity", "n", "sample"), [(2, 3, 0, (4,)), (2, 0, 3, (4,)), (2, 3, 4, (0,)), (0, 3, 0, (4,))], ids=str
)
def test_empty(implementation, rng, groups, capacity, n, sample):
    labels = torch.zeros(n, dtype=torch.int64)
    check(implementation, make_bank(groups, capacity, sample, rng), torch.randn(n, *sample, generator=rng), labels)


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
def test_unaligned_and_strided_values(implementation, rng, change):
    bank = make_bank(3, 4, (2, 5), rng)
    values, labels = torch.randn(6, 2, 5, generator=rng), torch.randint(3, (6,), generator=rng)
    expected = by_definition(*bank, values, labels)
    moved = [b.to(implementation.device) for b in bank]
    implementation.on_device("bank_push_")(*moved, *(change(a.to(implementation.device)) for a in (values, labels)))
    assert all(torch.equal(m.cpu(), e) for m, e in zip(moved, expected, strict=True))


def test_an_unaligned_bank(implementation, rng):
    refs, counts, heads = make_bank(3, 4, (5,), rng, torch.float16)
    values, labels = torch.randn(6, 5, generator=rng), torch.randint(3, (6,), generator=rng)
    expected = by_definition(refs, counts, heads, values, labels)
    moved = [offset_by_one(b.to(implementation.device)) for b in (refs, counts, heads)]
    implementation.on_device("bank_push_")(*moved, values.to(implementation.device), labels.to(implementation.device))
    assert all(torch.equal(m.cpu(), e) for m, e in zip(moved, expected, strict=True))


def test_values_and_labels_are_not_changed(implementation, rng):
    bank = [b.to(implementation.device) for b in make_bank(3, 4, (5,), rng)]
    values = torch.randn(6, 5, generator=rng).to(implementation.device)
    labels = torch.randint(3, (6,), generator=rng).to(implementation.device)
    before = values.clone(), labels.clone()
    implementation.on_device("bank_push_")(*bank, values, labels)
    assert torch.equal(values, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize("bad", [-1, 3])
def test_out_of_range_label_is_an_error_on_cpu_and_changes_nothing(torch_op, rng, bad):
    if torch_op.device == "cuda":
        pytest.skip("no label is read on the host there; the next test")
    bank = make_bank(3, 4, (5,), rng)
    before = [b.clone() for b in bank]
    with pytest.raises(RuntimeError, match=r"svel::bank_push_: labels: expected .*\[0, 3\).*got"):
        torch_op.on_device("bank_push_")(*bank, torch.randn(2, 5, generator=rng), torch.tensor([1, bad]))
    assert all(torch.equal(a, b) for a, b in zip(bank, before, strict=True))


def test_the_last_group_is_no_label_where_it_takes_all(torch_op, rng):
    if torch_op.device == "cuda":
        pytest.skip("no label is read on the host there; the next test")
    bank = make_bank(3, 4, (5,), rng)
    with pytest.raises(RuntimeError, match=r"svel::bank_push_: labels: expected .*\[0, 2\).*got"):
        torch_op.on_device("bank_push_")(*bank, torch.randn(2, 5), torch.tensor([1, 2]), all_to_last=True)


@pytest.mark.gpu
@pytest.mark.parametrize("all_to_last", [False, True])
def test_out_of_range_label_is_skipped_on_cuda(rng, all_to_last):
    bank, values = make_bank(3, 4, (5,), rng), torch.randn(6, 5, generator=rng)
    labels = torch.tensor([0, -1, 1, 3, 2**40, 1] if all_to_last else [0, -1, 2, 3, 2**40, 2])
    moved = [b.cuda() for b in bank]
    torch.ops.svel.bank_push_(*moved, values.cuda(), labels.cuda(), all_to_last=all_to_last)
    expected = by_definition(*bank, values, labels, all_to_last)
    assert all(torch.equal(m.cpu(), e) for m, e in zip(moved, expected, strict=True))
