"""The paper's formulas, written out: what every contestant must give before it is timed, and what a step costs in FLOPs."""

import torch
from peers import CLOCK
from torch.utils.flop_counter import FlopCounterMode

from sslvision.backbones.backbone import Backbone
from sslvision.methods.dino import DINO
from sslvision.nn.masking import random_keep

# B images, L patches, K visible, P class and register tokens, D width, E decoder width, p patch side


def gate(method, contestants, views):
    """Return loss and gradient norm of the paper's formula and of each contestant, in fp32; stop if they differ."""
    if isinstance(method, DINO) and not hasattr(method.pretrained().model, "pos_embed"):
        views = views[:2]  # stock Swin pads small crops, so its answers to them are others
    views = [view[:2] for view in views]  # two images tell as much as all
    kernels, found = torch.get_float32_matmul_precision(), {}
    torch.set_float32_matmul_precision("highest")
    plain = plain_dino if isinstance(method, DINO) else plain_mae
    for name, model, loss_of in [
        ("the paper's formula", method, lambda: plain(method, views)),
        *((c.name, c, lambda c=c: c.loss(views)) for c in contestants),
    ]:
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[name] = {"loss": loss.item(), "gradient_norm": norm.item(), "trained_parameters": trained}
    torch.set_float32_matmul_precision(kernels)
    first = next(iter(found.values()))
    for name, values in found.items():
        for key, tolerance in (("loss", 1e-4), ("gradient_norm", 1e-3), ("trained_parameters", 0.01)):
            if abs(values[key] / first[key] - 1) > tolerance:
                raise SystemExit(
                    f"{name} is no equal: {key} {values[key]:.6g}, by the paper's formula {first[key]:.6g}."
                )
    return found


def same_loss(contestants, precision):
    """Stop if a contestant, compiled as it will be timed, does not give the first one's loss in the precision of the race."""
    losses = {}
    for contestant in contestants:
        with precision(contestant.cache_casts):
            losses[contestant.name] = contestant.loss(contestant.prepare()).item()
        if abs(losses[contestant.name] / losses[contestants[0].name] - 1) > 0.01:
            raise SystemExit(f"{contestant.name} is no equal as it will be timed: losses {losses}.")


def plain_mae(method, views):
    """MAE as the paper has it: embed all, drop the hidden; decode all in their order; error on the hidden ones."""
    images, noise = views
    backbone, p, P = method.backbone, method.backbone.stride, method.backbone.num_prefix
    keep, _ = random_keep(noise, method.mask_ratio)  # (B, K)
    if hasattr(backbone.model, "pos_embed"):
        vit = backbone.model
        tokens = vit.patch_embed(images) + vit.pos_embed[:, P:]  # (B, L, D)
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        first = (vit.cls_token + vit.pos_embed[:, :P]).expand(len(images), -1, -1)
        latent = vit.norm(vit.blocks(torch.cat([first, tokens], dim=1)))
    else:
        latent = backbone.encode(images, keep)
    tokens = method.decoder_embed(latent)  # (B, P+K, E)
    index = keep[..., None].expand(-1, -1, tokens.shape[2])
    everywhere = method.mask_token.expand(*noise.shape, -1).scatter(1, index, tokens[:, P:])  # (B, L, E)
    tokens = torch.cat([tokens[:, :P], everywhere], dim=1) + method.decoder_pos_embed
    predicted = method.decoder_pred(method.decoder_norm(method.decoder_blocks(tokens)))[:, P:]
    patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if method.norm_pix:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden = torch.ones_like(noise).scatter(1, keep, 0)  # (B, L)
    return ((predicted - patches).square().mean(-1) * hidden).sum() / hidden.sum()


def plain_dino(method, views):
    """DINO as the paper has it (algorithm 1): the mean over pairs of different views of H(p_t, p_s)."""
    targets = ((z - method.center) / method.teacher_temp(CLOCK) for z in plain_logits(method.teacher, views[:2]))
    q = [target.softmax(dim=-1).detach() for target in targets]
    log_p = [(z / method.student_temp).log_softmax(dim=-1) for z in plain_logits(method.student, views)]
    pairs = [(t, s) for t in range(2) for s in range(len(views)) if s != t]
    return sum(-(q[t] * log_p[s]).sum(dim=-1).mean() for t, s in pairs) / len(pairs)


def plain_logits(network, views):
    """Logits of each view, with every token of every block computed."""
    return [network["head"](Backbone.forward(network["backbone"], view)) for view in views]


def reference_flops(method, views):
    """Return FLOPs of a training step per image by the formulas above, whatever a contestant skips.

    2 for a multiplication and addition; the backward pass is twice the forward one, and a teacher has none.
    """
    one = [view[:1] for view in views]
    if isinstance(method, DINO):
        teacher = flops(lambda: plain_logits(method.teacher, one[:2]))
        return teacher + 3 * (flops(lambda: plain_dino(method, one)) - teacher)
    return 3 * flops(lambda: plain_mae(method, one))


def flops(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()
