import copy
import types
from functools import partial

import pytest
import timm
import torch
from torch import nn

from vision_transformer import VITS, Attention, VisionTransformer, vit_base, vit_nano, vit_small, vit_tiny


@pytest.mark.parametrize(
    ("make", "width", "heads", "millions"),
    [(vit_tiny, 192, 3, 5.5), (vit_small, 384, 6, 21.7), (vit_base, 768, 12, 85.8)],
)
def test_sizes_are_the_papers(make, width, heads, millions):
    with torch.device("meta"):
        model = make()
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, 12, heads)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.norm.eps == 1e-6 and model.blocks[0].attn.qkv.bias is not None


def test_published_aliases():
    assert VITS["deit_small"] is vit_small and VITS["deit_tiny"] is vit_tiny


def test_same_network_and_names_as_timm():
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    ours = vit_tiny().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (48, 24), (24, 48)])
def test_any_size_that_the_patch_divides(size):
    model = vit_nano(8, img_size=32).eval()
    x = torch.randn(2, 3, *size)
    tokens = 1 + (size[0] // 8) * (size[1] // 8)
    with torch.no_grad():
        assert model(x).shape == (2, 128)
        attention = model.get_last_selfattention(x)
        assert attention.shape == (2, 4, tokens, tokens)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, tokens))
        layers = model.get_intermediate_layers(x, 3)
        assert [tuple(layer.shape) for layer in layers] == [(2, tokens, 128)] * 3
        torch.testing.assert_close(layers[-1][:, 0], model(x))


@pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 30)])
def test_a_size_that_does_not_divide_is_an_error(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} image does not divide into patches of 8"):
        vit_nano(8)(torch.zeros(1, 3, height, width))


def test_position_embedding_is_exact_at_its_own_size_and_oriented_elsewhere():
    model = vit_nano(8, img_size=32)
    assert model.interpolate_pos_encoding(None, 32, 32) is model.pos_embed
    with torch.no_grad():  # an embedding that only grows from top to bottom
        rows = torch.arange(4.0).repeat_interleave(4)
        model.pos_embed[0, 1:] = rows[:, None]
        grid = model.interpolate_pos_encoding(None, 64, 16)[0, 1:, 0].reshape(8, 2)
    assert (grid.diff(dim=0)[1:-1] > 0).all()
    torch.testing.assert_close(grid[:, 0], grid[:, 1])


def test_position_embedding_of_a_rectangle():
    model = vit_nano(8, img_size=(64, 32))
    assert model.pos_embed.shape == (1, 1 + 8 * 4, 128)
    assert model.interpolate_pos_encoding(None, 64, 32) is model.pos_embed
    with torch.no_grad():  # an embedding that only grows from left to right
        model.pos_embed[0, 1:] = torch.arange(4.0).repeat(8)[:, None]
        for rows, cols in ((4, 8), (8, 8), (4, 4)):
            grid = model.interpolate_pos_encoding(None, 8 * rows, 8 * cols)[0, 1:, 0].reshape(rows, cols)
            assert (grid.diff(dim=1)[:, 1:-1] > 0).all()
            torch.testing.assert_close(grid, grid[:1].expand(rows, -1))
    assert vit_nano(8, img_size=[32]).grid == (4, 4)  # as the published code writes it


def test_queries_keys_and_values_have_no_bias_by_default():
    """As in the published class; the published networks give them one."""
    network = VisionTransformer([32], 8, embed_dim=48, depth=1, num_heads=3)
    biases = {name: value for name, value in network.named_parameters() if name.endswith("bias")}
    assert "blocks.0.attn.proj.bias" in biases and "blocks.0.attn.qkv.bias" not in biases
    assert not any(value.any() for name, value in biases.items() if "patch_embed" not in name)


def test_the_hidden_layer_is_as_wide_as_the_ratio_says():
    network = VisionTransformer([32], 8, embed_dim=48, depth=1, num_heads=3, mlp_ratio=2.5)
    assert network.blocks[0].mlp.fc1.out_features == network.blocks[0].mlp.fc2.in_features == 120


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("cls_only", [False, True])
def test_fused_attention_is_the_same_attention(cls_only, qkv_bias):
    torch.manual_seed(0)
    attention = Attention(48, 3, qkv_bias)
    x = torch.randn(2, 7, 48)
    q, k, v = attention.project(x, cls_only)
    assert q.shape == (2, 3, 1 if cls_only else 7, 16) and k.shape == v.shape == (2, 3, 7, 16)
    parts = [part.unflatten(-1, (3, 16)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1)]
    torch.testing.assert_close([q, k, v], [parts[0][:, :, : q.shape[2]], *parts[1:]])
    expected = attention.proj((attention.weights(q, k) @ v).transpose(1, 2).flatten(2))
    kernels = []
    for training in (True, False):  # on a CPU, explicit, then fused, which is for several queries
        out, weights = attention.train(training)(x, cls_only=cls_only)
        torch.testing.assert_close(out, expected)
        if training or cls_only:
            torch.testing.assert_close(weights, attention.weights(q, k))
        else:
            assert weights is None
        with torch.profiler.profile() as profile:
            attention(x, cls_only=cls_only)
        kernels.append({event.name for event in profile.events()})
    fused = "aten::scaled_dot_product_attention"
    assert [fused in names for names in kernels] == [False, not cls_only]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_block_computes_the_cls_token_as_if_it_computed_all(dtype):
    torch.manual_seed(0)
    model = vit_nano(8, img_size=32, drop_path_rate=0.5)
    model.cls_only = True
    images, weights = torch.randn(6, 3, 32, 16), torch.randn(6, 128)
    results = []
    for forward in (model, lambda x: model.get_intermediate_layers(x)[0][:, 0]):
        model.zero_grad()
        torch.manual_seed(1)  # drop path
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = forward(images)
        (out.float() * weights).sum().backward()
        results.append((out, {name: param.grad for name, param in model.named_parameters()}))
    (out, grads), (expected, expected_grads) = results
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (out - expected).norm() <= tolerance * expected.norm()
    for name, grad in expected_grads.items():
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding noise
            assert (grads[name] - grad).norm() <= 10 * tolerance * grad.norm(), name


def test_gradient_checkpointing_changes_nothing_but_memory():
    torch.manual_seed(0)
    model = vit_nano(8, img_size=32, drop_path_rate=0.5)
    images = torch.randn(4, 3, 32, 32)
    results, saved = [], []

    def count(tensor):
        saved[-1] += tensor.numel()
        return tensor

    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = model(images)
        out.square().sum().backward()
        results.append((out, [param.grad for param in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert saved[1] < saved[0] / 4


def test_drop_path_grows_with_depth_and_acts_in_training_only():
    model = vit_nano(8, img_size=32, drop_path_rate=0.5)
    assert [b.drop_path.p for b in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_drop_path_drops_each_branch_of_each_image_by_itself():
    torch.manual_seed(0)
    block = vit_nano(8, img_size=32, drop_path_rate=0.5).blocks[-1]
    x, ways = torch.randn(400, 2, 128), []
    with torch.no_grad():
        out = block(x)
        for first in (x, x + 2 * block.attn(block.norm1(x))[0]):
            ways += [first, first + 2 * block.mlp(block.norm2(first))]
    shares = [torch.isclose(out, way, atol=1e-4).flatten(1).all(1).float().mean().item() for way in ways]
    assert sum(shares) == pytest.approx(1) and shares == pytest.approx([0.25] * 4, abs=0.1)


@pytest.mark.parametrize(
    ("make", "std"), [(vit_nano, 0.09), (vit_tiny, 0.02), (partial(vit_nano, init_std=0.05), 0.05)]
)
def test_weights_begin_with_the_published_deviations(make, std):
    torch.manual_seed(0)
    model = make()
    first, last = model.blocks[0].attn.qkv.weight, model.blocks[-1].mlp.fc1.weight
    for weight, expected in ((model.pos_embed, 0.02), (model.cls_token, 0.02), (first, std), (last, std)):
        assert weight.std().item() == pytest.approx(expected, rel=0.15)


def test_hooks_in_evaluation_get_all_tokens():
    """As LOST, TokenCut and code that extracts features set them."""
    model = vit_nano(8, img_size=32).eval()
    seen = {}
    for name in ("blocks.5", "blocks.5.attn.qkv", "norm"):
        hook = lambda module, inputs, output, name=name: seen.update({name: output})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        out = model(torch.randn(2, 3, 32, 32))
    shapes = {name: tuple(output.shape) for name, output in seen.items()}
    assert shapes == {"blocks.5": (2, 17, 128), "blocks.5.attn.qkv": (2, 17, 384), "norm": (2, 17, 128)}
    assert torch.equal(out, seen["norm"][:, 0])


def test_the_last_block_computes_the_cls_token_only_if_asked_to_and_in_training():
    model, seen = vit_nano(8, img_size=32), []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    for model.cls_only in (False, True):
        for training in (False, True):
            model.train(training)(torch.randn(2, 3, 32, 32))
    assert seen == [17, 17, 17, 1]


# ---- what code for the published network does with it


def test_forward_hooks_see_all_tokens_in_training_too():
    """The hooks of Splice and dino-vit-features; a module sets a frozen network inside it to training."""
    model, seen = vit_nano(8, img_size=32), []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
        block.attn.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model.train()(x), model.eval()(x)
    assert len(seen) == 2 * 3 * 6 and all(output.shape[:2] == (1, 17) for output in seen)
    torch.testing.assert_close(seen[:18], seen[18:])


def test_blocks_and_attention_can_be_wrapped_and_removed():
    model = vit_nano(8, img_size=32)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.blocks[-1].attn = Wrapped(model.blocks[-1].attn)
    model.blocks[-1] = Wrapped(model.blocks[-1])
    torch.testing.assert_close(model(x), expected)
    tokens, model.blocks[-1] = model.get_intermediate_layers(x, 2)[0], torch.nn.Identity()
    torch.testing.assert_close(model(x), tokens[:, 0])


def test_overlapping_patches_as_other_projects_make_them():
    """dino-vit-features sets a smaller stride and replaces `interpolate_pos_encoding(x, w, h)`."""
    model = vit_nano(8, img_size=32).eval()
    model.patch_embed.proj.stride = 4

    def replacement(self, x, w, h):
        assert x.shape[1] == 1 + 15 * 7
        grid = self.pos_embed[:, 1:].unflatten(1, (4, 4)).movedim(3, 1)
        grid = torch.nn.functional.interpolate(grid, ((w - 8) // 4 + 1, (h - 8) // 4 + 1), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], dim=1)

    model.interpolate_pos_encoding = types.MethodType(replacement, model)
    assert model.get_last_selfattention(torch.randn(2, 3, 64, 32)).shape == (2, 4, 106, 106)


@pytest.mark.parametrize("training", [False, True])
def test_the_cls_row_of_the_last_attention(training):
    model = vit_nano(8, img_size=32).train(training)
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        whole, row = model.get_last_selfattention(x), model.get_attention(x, token=0)[:, :, 0]
    assert row.shape == (2, 4, 16)
    torch.testing.assert_close(row, whole[:, :, 0])


@pytest.mark.parametrize(("layer", "token", "rows"), [(1, None, 401), (1, 0, 1), (2, 7, 1)])
def test_the_row_of_a_token_needs_no_map_of_all_tokens(layer, token, rows):
    model, x = vit_nano(8, img_size=32).eval(), torch.randn(1, 3, 160, 160)  # 401 tokens
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        model.get_attention(x, layer, token)
    maps = [event.input_shapes[0] for event in profile.events() if event.name == "aten::softmax"]
    assert maps == [[1, 4, rows, 401]]


def test_intermediate_layers_of_none_few_and_all_blocks():
    model = vit_nano(8, img_size=32).eval()
    x = torch.randn(1, 3, 32, 32)
    assert [len(model.get_intermediate_layers(x, n)) for n in (0, 1, 5, 6, 7)] == [0, 1, 5, 6, 6]


@pytest.mark.parametrize("layer", [1, 3, 6])
def test_attention_of_any_block_and_token(layer):
    torch.manual_seed(0)
    model = vit_nano(8, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole, row = model.get_attention(x, layer), model.get_attention(x, layer, token=5)
        tokens = model.prepare_tokens(x)
        for block in model.blocks[:-layer]:
            tokens = block(tokens)
        last = model.blocks[-layer]
        q, k, _ = last.attn.project(last.norm1(tokens))
    torch.testing.assert_close(whole, last.attn.weights(q, k))
    assert row.shape == (2, 4, 1, 17)
    torch.testing.assert_close(row, whole[:, :, 5:6])


def test_gradient_of_the_position_embedding_has_one_order_of_sums():
    """No step of its backward pass is that of F.interpolate, whose bits differ from run to run on a GPU."""
    model = vit_nano(8, img_size=32)
    names, steps = set(), [model.interpolate_pos_encoding(None, 48, 16).grad_fn]
    while steps:
        step = steps.pop()
        names.add(step.name())
        steps += [before for before, _ in step.next_functions if before]
    assert any("Bmm" in name for name in names) and not any("Upsample" in name for name in names)


def test_a_position_embedding_in_half_precision_is_rounded_once():
    model = vit_nano(8, img_size=32)
    exact = model.interpolate_pos_encoding(None, 48, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.interpolate_pos_encoding(None, 48, 16), exact)
    model = model.bfloat16()
    expected = copy.deepcopy(model).float().interpolate_pos_encoding(None, 48, 16).bfloat16()
    assert torch.equal(model.interpolate_pos_encoding(None, 48, 16), expected)


def test_a_classifier_is_there_if_asked_for_and_not_applied():
    """As in the published code, for which other projects write `model.head(model(x))`."""
    model = vit_nano(8, img_size=32, num_classes=7)
    features = model(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 128) and model.head(features).shape == (2, 7)


@torch.no_grad()
def test_attention_is_what_the_modules_give():
    """Other projects hook, wrap and replace the last block and its attention; a fused kernel gives none."""
    model, images = vit_nano(8, img_size=32).eval(), torch.randn(2, 3, 32, 32)
    plain = model.get_last_selfattention(images)
    tokens = model.prepare_tokens(images)
    for block in model.blocks:
        maps, tokens = block(tokens, return_attention=True), block(tokens)
    assert torch.equal(maps, plain)
    torch.testing.assert_close(plain, model.get_attention(images))

    last, seen = model.blocks[-1], []
    hooks = [
        module.register_forward_hook(lambda *given: seen.append(given[2])) for module in (last, last.attn)
    ]
    assert model.get_last_selfattention(images) is seen[0][1] is seen[1]
    model(images)
    torch.testing.assert_close(seen[2][1], plain)
    for hook in hooks:
        hook.remove()
    last.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    doubled = model.get_last_selfattention(images)
    last.attn = Wrapped(last.attn)
    assert torch.equal(model.get_last_selfattention(images), doubled)
    last.attn.forward = lambda x: (x, plain)
    assert model.get_last_selfattention(images) is plain


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@torch.no_grad()
def test_blocks_that_work_in_place_give_their_own_layers():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.add_(1)

    model = vit_nano(8, img_size=32)
    model.blocks, model.norm = nn.ModuleList([InPlace(), InPlace(), InPlace()]), Twice()
    first, second = model.get_intermediate_layers(torch.zeros(1, 3, 32, 32), 2)
    torch.testing.assert_close(first + 2, second)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_position_embedding_may_be_replaced_by_that_of_another_square():
    model, larger = vit_nano(8, img_size=32), vit_nano(8, img_size=48)
    model.pos_embed = larger.pos_embed
    for size in (32, 48, 64):
        found, expected = (each.interpolate_pos_encoding(None, size, size) for each in (model, larger))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward"])
def test_a_changed_projection_acts_on_the_cls_token_too(change):
    attention, x = Attention(48, 3), torch.randn(2, 7, 48)
    if change == "hook":
        attention.qkv.register_forward_hook(lambda _, given, out: 2 * out)
    elif change == "pre-hook":  # as of torch.nn.utils.prune
        attention.qkv.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    else:
        attention.qkv.forward = lambda x: 2 * nn.functional.linear(x, attention.qkv.weight)
    torch.testing.assert_close(attention(x, cls_only=True)[0], attention(x)[0][:, :1])


def test_position_embedding_keeps_double_precision():
    model = vit_nano(8, img_size=32).double()
    grid = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    scale = (6.1 / 4, 2.1 / 4)
    expected = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).mT
    found = model.interpolate_pos_encoding(None, 48, 16)[:, 1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_at_another_size_than_the_embeddings():
    """`torch.jit.trace`, and ONNX without dynamo, make sizes tensors; the trace refuses further sizes."""
    model, images = vit_nano(img_size=32).eval(), torch.randn(2, 3, 48, 16)
    traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(images[:1]), model(images[:1]))
    with pytest.raises(RuntimeError, match="size of tensor"):
        traced(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(("layer", "token"), [(0, None), (-1, 0), (7, None), (1, 17), (1, -18)])
def test_attention_that_is_not_there_is_an_error(layer, token):
    with pytest.raises(IndexError, match=f"layer {layer} of 6, token {token} of 17"):
        vit_nano(8, img_size=32).get_attention(torch.randn(1, 3, 32, 32), layer, token)


class LowRank(nn.Linear):
    """A linear layer with an adapter, as LoRA adds it."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 10)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 10)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def test_an_adapter_in_place_of_a_layer_acts_in_the_last_block_too():
    model = vit_nano(8, img_size=32)
    for block in model.blocks:
        block.attn.qkv = LowRank(block.attn.qkv)
    images = torch.randn(2, 3, 32, 32)
    outputs = model.train()(images)
    torch.testing.assert_close(outputs, model.eval()(images))
    outputs.sum().backward()
    assert all(block.attn.qkv.up.grad is not None for block in model.blocks)
    row = model.get_attention(images, token=0)
    torch.testing.assert_close(row, model.get_last_selfattention(images)[:, :, :1])
