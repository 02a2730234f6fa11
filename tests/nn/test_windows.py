import pytest
import timm
import torch
from timm.models.swin_transformer import PatchMerging, WindowAttention

from sslvision.nn import windows as under_test
from sslvision.nn.windows import SafeWindowAttention, WindowPartition, build_windows, nested_order, window_attention

torch.manual_seed(0)
CUT = WindowPartition(size=(32, 32), window=(8, 8), shift=(4, 4), table=(8, 8))
UNSHIFTED = WindowPartition(size=(32, 32), window=(8, 8), shift=(0, 0), table=(8, 8))


def visible_tokens(keep, unit, columns):
    """Coordinates (b, K * unit**2) of the tokens of units `keep` (b, K)."""
    y, x = nested_order(unit.bit_length() - 1)
    return (
        ((keep // columns * unit)[:, :, None] + y).flatten(1),
        ((keep % columns * unit)[:, :, None] + x).flatten(1),
    )


def attention_like(partition):
    attention = WindowAttention(16, 2, window_size=partition.table).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    return attention


def by_definition(attention, tokens, y, x, partition):
    """Every token attends to the tokens that no cut separates it from."""
    part_y, part_x = (
        torch.bucketize(at.contiguous(), torch.arange(shift or w, side, w), right=True)
        for at, side, w, shift in zip((y, x), partition.size, partition.window, partition.shift, strict=True)
    )
    together = (part_y[:, :, None] == part_y[:, None]) & (part_x[:, :, None] == part_x[:, None])
    index = (y[:, :, None] - y[:, None] + partition.table[0] - 1) * (2 * partition.table[1] - 1)
    index = index + x[:, :, None] - x[:, None] + partition.table[1] - 1
    bias = attention.relative_position_bias_table[index * together].permute(0, 3, 1, 2)
    query, key, value = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(2, 3) * attention.scale + bias
    weights = logits.masked_fill(~together[:, None], -torch.inf).softmax(dim=-1)
    return attention.proj((weights @ value).transpose(1, 2).flatten(2))


def test_merging_is_a_reshape_in_nested_order():
    merging = PatchMerging(dim=3).double()
    tokens = torch.randn(2, 8, 8, 3, dtype=torch.float64)
    y, x = nested_order(3)
    merged = merging.reduction(merging.norm(tokens[:, y, x].unflatten(1, (-1, 4)).flatten(2)))
    y, x = nested_order(2)
    assert torch.allclose(merged, merging(tokens)[:, y, x], atol=1e-12)


# What each layout is chosen for: rows of one unit, of one image, of one window.
LAYOUTS = {
    "units are windows": (UNSHIFTED, 8, 4, "unit"),
    "few tokens, whole images": (CUT, 2, 24, "image"),
    "one window": (WindowPartition((8, 8), (8, 8), (0, 0), (8, 8)), 2, 6, "image"),
    "many tokens in shifted windows": (CUT, 8, 4, "window"),
    "windows of several units": (UNSHIFTED, 4, 16, "window"),
    "windows that divide nothing": (WindowPartition((32, 40), (7, 5), (3, 2), (7, 6)), 8, 5, "window"),
    "shrunk windows": (WindowPartition((16, 8), (7, 8), (3, 0), (7, 9)), 4, 6, "window"),
    "windows shifted along one axis": (WindowPartition((32, 32), (8, 16), (4, 0), (8, 16)), 8, 7, "window"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_tokens_attend_to_those_that_no_cut_separates_them_from(layout, count, shared):
    partition, unit, kept, kind = LAYOUTS[layout]
    rows, columns = partition.size[0] // unit, partition.size[1] // unit
    keep = torch.rand(1 if shared else 3, rows * columns).argsort(dim=1)[:, :kept]
    y, x = visible_tokens(keep, unit, columns)
    windows = build_windows(keep, unit, partition, 3 if shared else 1, count=count)
    expected = {"unit": unit**2, "image": kept * unit**2, "window": partition.window[0] * partition.window[1]}[kind]
    assert windows.slots == expected
    assert (windows.slot_index is not None) is (kind == "window")

    attention, tokens = (
        attention_like(partition),
        torch.randn(3, y.shape[1], 16, dtype=torch.float64, requires_grad=True),
    )
    weight = torch.randn(3, y.shape[1], 16, dtype=torch.float64)
    leaves = [tokens, *attention.parameters()]
    got = window_attention(attention, tokens, windows)
    right = by_definition(attention, tokens, y.expand(3, -1), x.expand(3, -1), partition)
    assert torch.allclose(got, right, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((weight * got).sum(), leaves),
        torch.autograd.grad((weight * right).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_there_are_no_more_rows_than_windows_with_tokens_if_they_are_counted():
    keep = torch.tensor([[0, 3, 12, 15], [5, 6, 9, 10]])  # of 4 x 4 units: the corners, the middle
    assert build_windows(keep, 8, CUT, count=True).rows == 4 * 4 + 3 * 3
    assert build_windows(keep, 8, CUT, count=False).rows == 2 * 4 * 4  # a unit touches 4 windows


def test_rows_that_need_not_be_counted_always_suffice():
    for partition in (
        CUT,
        WindowPartition((32, 32), (7, 7), (3, 3), (7, 7)),
        WindowPartition((32, 32), (6, 6), (0, 0), (6, 6)),
    ):
        for _ in range(20):
            keep = torch.rand(2, 16).argsort(dim=1)[:, :3]
            counted, bounded = (build_windows(keep, 8, partition, count=count) for count in (True, False))
            assert counted.slot_index.max() < counted.rows * counted.slots
            assert counted.rows <= bounded.rows
            assert torch.equal(counted.slot_index, bounded.slot_index)


def test_an_image_whose_tokens_are_not_finite_spoils_no_other():
    keep = torch.rand(2, 16).argsort(dim=1)[:, :4]
    windows = build_windows(keep, 8, CUT, count=False)
    attention, tokens = attention_like(CUT), torch.randn(2, 256, 16, dtype=torch.float64)
    spoilt = tokens.clone()
    spoilt[0] = torch.nan
    assert torch.equal(window_attention(attention, spoilt, windows)[1], window_attention(attention, tokens, windows)[1])


def test_dropout_of_attention_is_applied_while_training():
    block = (
        timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=8, embed_dim=24, attn_drop_rate=0.5)
        .layers[0]
        .blocks[0]
    )
    windows = build_windows(torch.tensor([[0, 3]]), 8, WindowPartition((16, 16), (8, 8), (0, 0), (8, 8)), count=True)
    tokens = torch.randn(1, 128, 24)
    once, again = (window_attention(block.attn.train(), tokens, windows) for _ in range(2))
    assert not torch.allclose(once, again)
    once, again = (window_attention(block.attn.eval(), tokens, windows) for _ in range(2))
    assert torch.equal(once, again)


def fused(attention):
    attention.fused_attn = True
    return attention


def gradients(output, weight, leaves):
    return torch.autograd.grad((weight * output).sum(), leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False])
def test_fused_attention_in_parts_is_what_it_is_at_once(layout, shared, monkeypatch):
    partition, unit, kept, _ = LAYOUTS[layout]
    rows, columns = partition.size[0] // unit, partition.size[1] // unit
    keep = torch.rand(1 if shared else 5, rows * columns).argsort(dim=1)[:, :kept]
    windows = build_windows(keep, unit, partition, 5 if shared else 1, count=True)
    attention, N = fused(attention_like(partition)), kept * unit**2
    tokens, weight = torch.randn(2, 5, N, 16, dtype=torch.float64)
    leaves = [tokens.requires_grad_(), *attention.parameters()]
    right = window_attention(attention, tokens, windows)
    monkeypatch.setattr(under_test, "MAX_ROWS", 2)
    got = window_attention(attention, tokens, windows)
    assert torch.allclose(got, right, rtol=0, atol=1e-12)
    for one, other in zip(gradients(got, weight, leaves), gradients(right, weight, leaves), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [True, False])
def test_timms_attention_in_parts_is_what_it_is_at_once(masked, monkeypatch):
    attention = fused(attention_like(UNSHIFTED))
    x, weight = torch.randn(2, 5 * 4, 64, 16, dtype=torch.float64)  # 5 images of 4 windows
    mask = (
        torch.zeros(4, 64, 64, dtype=torch.float64).masked_fill_(torch.rand(4, 64, 64) < 0.3, -100) if masked else None
    )
    leaves, seen, attend = (
        [x.requires_grad_(), *attention.parameters()],
        [],
        torch.nn.functional.scaled_dot_product_attention,
    )
    right = attention(x, mask)
    attention.__class__ = SafeWindowAttention
    assert torch.equal(attention(x, mask), right)
    monkeypatch.setattr(under_test, "MAX_ROWS", 9)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **b: (seen.append(len(q)), attend(q, *a, **b))[1],
    )
    got = attention(x, mask)
    assert seen == ([8, 8, 4] if masked else [9, 9, 2])
    assert torch.allclose(got, right, rtol=0, atol=1e-12)
    for one, other in zip(gradients(got, weight, leaves), gradients(right, weight, leaves), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("frozen", "recorded", "cudnn"),
    [([], True, True), (["bias"], True, False), (["bias"], False, True), (["all"], True, True)],
)
@pytest.mark.parametrize("through", ["timm", "windows"])
def test_cudnn_does_not_compute_attention_whose_gradients_it_may_get_wrong(
    through, frozen, recorded, cudnn, monkeypatch
):
    attention, seen = fused(attention_like(UNSHIFTED)), []
    attention.__class__ = SafeWindowAttention
    attention.relative_position_bias_table.requires_grad_(not frozen)
    if frozen == ["all"]:
        attention.requires_grad_(False)
    attend = torch.nn.functional.scaled_dot_product_attention

    def look(*about, **more):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*about, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    with torch.set_grad_enabled(recorded):
        if through == "timm":
            attention(torch.randn(2, 64, 16, dtype=torch.float64))
        else:
            windows = build_windows(torch.tensor([[0, 3]]), 8, UNSHIFTED, count=True)
            window_attention(attention, torch.randn(1, 128, 16, dtype=torch.float64), windows)
    assert seen == [cudnn]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_without_cudnn_goes_into_a_graph():
    attention = fused(attention_like(UNSHIFTED))
    attention.__class__ = SafeWindowAttention
    attention.relative_position_bias_table.requires_grad_(False)
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), attention(x), atol=1e-12)
