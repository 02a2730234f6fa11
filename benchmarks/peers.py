"""One training step of ours and of other libraries, on the same weights, images and masks.

Peers are imported, never copied: transformers' ViTMAEForPreTraining, and MAE and DINO put together from lightly's modules
as lightly's own examples do. All of them take the paper's step: MAE with normalized targets; DINO with clipped
gradients, trained prototypes, a moved center and a moved teacher. Weights, positions and sizes are those of ours.
"""

import re

import timm
import torch
from torch import nn

from sslvision.augment.randomness import ImageRandom
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.nn.compilation import compile_module
from sslvision.nn.cuda_graphs import CapturedStep
from sslvision.nn.masking import random_keep
from sslvision.optim.param_groups import decay_groups
from sslvision.training.trainer import configure_method

CLOCK = Clock(step=20_000, steps=100_000, steps_per_epoch=1_000)  # past warm-up and frozen prototypes
RATES = {"lr": 1e-5, "weight_decay": 0.04}
BLOCKS = ("Block", "SwinTransformerBlock", "ViTMAELayer")  # the peers' classes whose instances are compiled

# B images, L patches, K visible, E decoder width


class Contestant(nn.Module):
    """A training step: `prepare` gives views, `loss` is the forward pass, `update` moves the weights, `follow` a teacher.

    It is built uncompiled, so that it can be compared with the others first; `choose_layers` comes before it is timed.

    Args:
        ours: the method whose weights, sizes and betas it takes.
        views: what `ours.views` returns, ready-made on the device.
    """

    cache_casts = True  # autocast keeps a weight's bf16 copy for the step, which is torch's default

    def __init__(self, name, ours, views):
        super().__init__()
        self.name, self.views = name, views
        self.betas, self.momentum, self.chosen = ours.betas, None, {}
        if isinstance(ours, DINO):
            self.momentum = ours.schedule_momentum(CLOCK.step, steps=CLOCK.steps)

    def finish(self, ours, *, fused_attention=None, fused_adamw=True, compiled=False):
        """Build the optimizer, choose the kernels. None: attention as the library ships it."""
        if fused_attention is not None:
            for module in self.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused_attention
        fused = True if fused_adamw else None  # None: what torch chooses
        self.chosen |= {"fused_attention": fused_attention, "fused_adamw": fused_adamw, "compiled": compiled}
        self.to(ours.device).train()
        self.optimizer = torch.optim.AdamW(decay_groups(self), lr=RATES["lr"], betas=self.betas, fused=fused)
        return self

    def choose_layers(self):
        """Compile every transformer block if so chosen. Shapes are static, as ours are."""
        if self.chosen["compiled"]:
            for module in self.modules():
                if type(module).__name__ in BLOCKS:
                    compile_module(module)

    def prepare(self):
        return self.views

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update_ema(self):
        pass


class Ours(Contestant):
    """Our method, step by step what `Method.training_step` and `optimizer_step` do under the Trainer.

    Args:
        batch: bytes to make views of in every step; None: ready-made views.
        compiled, captured: as the settings `compile` and `cuda_graphs` of a run; None: what a run does on this device.
    """

    cache_casts = False  # as Lightning has it

    def __init__(self, name, method, views, *, batch=None, compiled=None, captured=None):
        super().__init__(name, method, views)
        self.method, self.batch, self.graphs = method, batch, None
        self.chosen |= {"compiled": compiled, "captured": captured}
        self.optimizer = method.configure_optimizers()
        method.train()

    def choose_layers(self):
        """Choose the method's layers as a run does. Once for a method, however many contestants share it."""
        chosen = self.chosen
        configure_method(self.method, self.method.device, compile=chosen["compiled"], cuda_graphs=chosen["captured"])

    def prepare(self):
        torch.default_generator.manual_seed(0)
        if self.method.device.type != "cpu":
            torch.get_device_module(self.method.device).manual_seed(0)
        if self.batch is None:
            return self.views
        crops, indices, epoch, _, shown = self.batch
        if self.method.captures:  # the graph makes the views
            return [*crops, indices, epoch, shown]
        with torch.autocast(self.method.device.type, enabled=False):
            return self.method.views(self.batch, ImageRandom(0, epoch, indices))

    def loss(self, views):
        metrics = self.replay(views) if self.method.captures else self.method.losses(views, CLOCK)
        loss = metrics["loss"]
        self.metrics = torch.stack([value.detach().to(loss.dtype) for value in metrics.values()])
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def replay(self, inputs):
        """Return the losses of CUDA graphs, captured in the first step."""
        if self.graphs is None:
            function = (
                (lambda *views: self.method.losses([*views], None)) if self.batch is None else self.method._step_of
            )
            self.graphs = CapturedStep(function, self.method, inputs)
        self.method.set_clock(CLOCK)
        return self.graphs(*inputs)

    def update(self):
        for group in self.optimizer.param_groups:
            group["lr"] = RATES["lr"]
            if group["decayed"]:
                group["weight_decay"] = RATES["weight_decay"]
        self.metrics = torch.cat([self.metrics, self.method.prepare_update(self.optimizer, CLOCK)[None]])
        super().update()

    def update_ema(self):
        self.method.after_update(CLOCK)


class TransformersMAE(Contestant):
    """`ViTMAEForPreTraining`. As shipped: fused attention, and AdamW as its Trainer builds it."""

    def __init__(self, name, ours, views, *, fused_attention=True, compiled=False, **_):
        super().__init__(name, ours, views)
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        vit, decoder = ours.backbone.model, ours.decoder_blocks
        config = ViTMAEConfig(
            hidden_size=ours.backbone.embed_dim,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=vit.blocks[0].attn.num_heads,
            intermediate_size=vit.blocks[0].mlp.fc1.out_features,
            layer_norm_eps=1e-6,
            image_size=ours.backbone.image_size[0],
            patch_size=ours.backbone.stride,
            num_channels=ours.backbone.channels,
            decoder_num_attention_heads=decoder[0].attn.num_heads,
            decoder_hidden_size=ours.decoder_embed.out_features,
            decoder_num_hidden_layers=len(decoder),
            decoder_intermediate_size=decoder[0].mlp.fc1.out_features,
            mask_ratio=ours.mask_ratio,
            norm_pix_loss=ours.norm_pix,
            attn_implementation="sdpa" if fused_attention else "eager",
        )
        self.model = ViTMAEForPreTraining(config)
        self.model.load_state_dict(transformers_names(ours))
        self.finish(ours, compiled=compiled)
        self.chosen["fused_attention"] = fused_attention

    def loss(self, views):
        images, noise = views
        return self.model(images, noise=noise).loss


class LightlyMAE(Contestant):
    """lightly's `MaskedVisionTransformerTIMM` and its decoder. As shipped: timm's fused attention, plain AdamW."""

    def __init__(self, name, ours, views, *, arch, joined=None, **options):
        super().__init__(name, ours, views)
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM

        decoder, self.patch = ours.decoder_blocks, ours.backbone.stride
        width, heads = ours.decoder_embed.out_features, decoder[0].attn.num_heads
        self.mask_ratio, self.norm_pix = ours.mask_ratio, ours.norm_pix
        self.backbone = lightly_backbone(ours.backbone, arch)
        self.backbone.vit.pos_embed.requires_grad_(False)
        self.decoder_embed = nn.Linear(ours.backbone.embed_dim, width)
        patches = ours.backbone.grid[0] * ours.backbone.grid[1]
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            patches, width, len(decoder), heads, num_prefix_tokens=ours.backbone.num_prefix
        )
        self.prediction_head = nn.Linear(width, ours.decoder_pred.out_features)
        for own, other in (
            (self.decoder_embed, ours.decoder_embed),
            (self.decoder.blocks, decoder),
            (self.decoder.norm, ours.decoder_norm),
            (self.prediction_head, ours.decoder_pred),
        ):
            own.load_state_dict(other.state_dict())
        self.decoder.mask_token.data.copy_(ours.mask_token)
        self.decoder.pos_embed.data.copy_(ours.decoder_pos_embed)
        self.finish(ours, **options)

    def loss(self, views):
        from lightly.models import utils

        images, noise = views
        keep, hidden = (1 + index for index in random_keep(noise, self.mask_ratio))  # 0 is the class token
        keep = torch.cat([torch.zeros_like(keep[:, :1]), keep], dim=1)  # (B, 1+K)
        tokens = self.decoder_embed(self.backbone.encode(images, idx_keep=keep))
        everywhere = tokens.new_zeros(len(images), 1 + noise.shape[1], tokens.shape[-1])  # (B, 1+L, E)
        decoded = self.decoder(utils.set_at_index(everywhere, keep, tokens), idx_mask=hidden)
        predicted = self.prediction_head(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(utils.patchify(images, self.patch), hidden - 1)
        if self.norm_pix:
            target = utils.normalize_mean_var(target)
        return nn.functional.mse_loss(predicted, target)


class LightlyDINO(Contestant):
    """lightly's backbone, head, loss and teacher.

    As shipped: a forward pass for each view, as in its example; fused attention, plain AdamW. Else (`joined`): views of a
    size in one pass, as in its own benchmark.
    """

    def __init__(self, name, ours, views, *, arch, joined=True, **options):
        super().__init__(name, ours, views)
        from lightly.loss import DINOLoss

        self.joined, self.clip = joined, ours.clip_gradient
        self.chosen["joined"] = joined
        self.student_backbone, self.student_head = lightly_dino_network(ours.student, arch)
        self.teacher_backbone, self.teacher_head = lightly_dino_network(ours.teacher, arch)
        self.teacher_backbone.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self.criterion = DINOLoss(
            ours.center.shape[1],
            teacher_temp=ours.teacher_temp(CLOCK),
            student_temp=ours.student_temp,
            center_momentum=ours.center_momentum,
        )
        self.criterion.center.copy_(ours.center)
        self.finish(ours, **options)
        self.teacher_backbone.eval()

    def loss(self, views):
        sizes = [views[:2], views[2:]] if self.joined else [[view] for view in views]
        with torch.no_grad():
            teacher = [
                self.teacher_head(self.teacher_backbone(torch.cat(part)))
                for part in (sizes[:1] if self.joined else sizes[:2])
            ]
        student = [self.student_head(self.student_backbone(torch.cat(part))) for part in sizes if part]
        # Without a temperature it takes that of __init__.
        return self.criterion([*torch.cat(teacher).chunk(2)], [*torch.cat(student).chunk(len(views))])

    def update(self):
        if self.clip:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip)
        super().update()

    def update_ema(self):
        from lightly.models.utils import update_momentum

        update_momentum(self.student_backbone, self.teacher_backbone, m=self.momentum)
        update_momentum(self.student_head, self.teacher_head, m=self.momentum)


PEERS = {("hf", MAE): TransformersMAE, ("lightly", MAE): LightlyMAE, ("lightly", DINO): LightlyDINO}


def lightly_backbone(backbone, arch):
    """Return lightly's ViT with the weights of a ViT of ours; what lightly has no wrapper for is stock timm."""
    from lightly.models.modules import MaskedVisionTransformerTIMM

    if not hasattr(backbone.model, "pos_embed"):
        model = timm.create_model(arch, num_classes=0, strict_img_size=False, **backbone.arguments)
        model.load_state_dict(backbone.model.state_dict())
        return model
    vit = timm.create_model(arch, num_classes=0, dynamic_img_size=True, **backbone.arguments)
    vit.load_state_dict(backbone.model.state_dict())
    return MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip")


def lightly_dino_network(network, arch):
    """Return lightly's backbone and head with the weights of our student or teacher."""
    from lightly.models.modules import DINOProjectionHead

    head = network["head"]
    prototypes, bottleneck = head.last_layer.weight_v.shape
    settings = {
        "batch_norm": False,
        "freeze_last_layer": 1,
        "norm_last_layer": not head.last_layer.weight_g.requires_grad,
    }
    own = DINOProjectionHead(head.mlp[0].in_features, head.mlp[0].out_features, bottleneck, prototypes, **settings)
    own.load_state_dict({name.replace("mlp.", "layers."): value for name, value in head.state_dict().items()})
    return lightly_backbone(network["backbone"], arch), own


def transformers_names(ours):
    """Return the weights of our MAE under the names of `ViTMAEForPreTraining`."""
    names = (
        (r"^backbone\.model\.blocks", "vit.layers"),
        (r"^backbone\.model\.cls_token", "vit.embeddings.cls_token"),
        (r"^backbone\.model\.pos_embed", "vit.embeddings.position_embeddings"),
        (r"^backbone\.model\.patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
        (r"^backbone\.model\.norm", "vit.layernorm"),
        (r"^decoder_blocks", "decoder.decoder_layers"),
        (r"^(decoder_|mask_token)", r"decoder.\1"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
    )
    state = {}
    for name, value in ours.state_dict().items():
        for pattern, other in names:
            name = re.sub(pattern, other, name)
        if ".attn.qkv." in name:
            for part, own in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = own
        elif not name.startswith("normalize."):
            state[name] = value
    return state
