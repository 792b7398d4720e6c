"""DINO as one would write it from the paper, plainly and without a thought for speed: the baseline.

Views by torchvision's transforms on PIL images; a log-softmax for each pair of views; clipping and the
teacher's average parameter by parameter; k-NN for one k at a time.
"""

import functools
import random

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from support.backbones import build_backbone
from support.pixels import IMAGENET_MEAN, IMAGENET_STD
from utils import DINOHead, MultiCropWrapper, get_params_groups
from vision_transformer import VITS


class Blur:
    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Views:
    """An RGB image -> 2 views of 224 and 8 of 96 pixels, normalised float tensors."""

    def __init__(self):
        def view(size, scale, blur_p, solarize_p=0.0):
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC),
                    transforms.RandomHorizontalFlip(),
                    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                    transforms.RandomGrayscale(0.2),
                    Blur(blur_p),
                    transforms.RandomSolarize(128, solarize_p),
                    transforms.ToTensor(),
                    transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                ]
            )

        local = view(96, (0.05, 0.4), 0.5)
        self.views = [view(224, (0.4, 1), 1.0), view(224, (0.4, 1), 0.1, 0.2), *[local] * 8]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


def textbook_attention(attn: nn.Module, x: Tensor) -> tuple[Tensor, None]:
    """softmax(q k^T) v, also where the module would use a fused kernel."""
    q, k, v = attn.project(x)
    return attn.proj((attn.weights(q, k) @ v).transpose(1, 2).flatten(2)), None


class WholeViT(nn.Module):
    """Every token through every block, attention as softmax(q k^T) v."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        for block in vit.blocks:
            block.attn.forward = functools.partial(textbook_attention, block.attn)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.get_intermediate_layers(x)[0][:, 0]


def pair_loss(student: Tensor, teacher: Tensor, center: Tensor, views: int, temp: float = 0.04) -> Tensor:
    """Cross-entropies of all pairs of different views; moves the centre."""
    students = (student / 0.1).chunk(views)
    teachers = F.softmax((teacher - center) / temp, dim=-1).detach().chunk(2)
    total, terms = 0.0, 0
    for i, q in enumerate(teachers):
        for v, s in enumerate(students):
            if i != v:
                total = total + (-q * F.log_softmax(s, dim=-1)).sum(dim=-1).mean()
                terms += 1
    center.mul_(0.9).add_(0.1 * teacher.detach().mean(dim=0, keepdim=True))
    return total / terms


class Trainer:
    """Student, teacher and one optimisation step, on one device; `dtype` is autocast's, if any."""

    def __init__(
        self,
        arch: str,
        out_dim: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        dtype: torch.dtype | None = None,
    ):
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.student, self.teacher = (self.network(arch, out_dim, rate).to(device) for rate in (0.1, 0.0))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, out_dim, device=device)
        self.optimizer = torch.optim.AdamW(get_params_groups(self.student), lr=1e-6)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @staticmethod
    def network(arch: str, out_dim: int, drop_path_rate: float) -> nn.Module:
        if arch not in VITS:
            backbone, embed_dim = build_backbone(arch)
            return MultiCropWrapper(backbone, DINOHead(embed_dim, out_dim))
        vit = VITS[arch](drop_path_rate=drop_path_rate)
        return MultiCropWrapper(WholeViT(vit), DINOHead(vit.embed_dim, out_dim))

    def step(self, views: list[Tensor]) -> float:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            teacher, student = self.teacher(views[:2]), self.student(views)
        loss = pair_loss(student.float(), teacher.float(), self.center, len(views))
        value = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for param in self.student.parameters():
            if param.grad is not None:
                norm = param.grad.norm(2)
                if (3.0 / (norm + 1e-6)).item() < 1:
                    param.grad.mul_(3.0 / (norm + 1e-6))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                t.mul_(0.996).add_(0.004 * s)
        return value


def knn(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, num_classes: int
) -> float:
    """Top-1 accuracy of the weighted k-NN classifier, a hundred test images at a time."""
    right = 0
    for x, y in zip(test.split(100), test_labels.split(100), strict=True):
        similarity, index = (x @ train.T).topk(k, largest=True, sorted=True)
        labels = train_labels[None].expand(len(x), -1).gather(1, index)
        votes = torch.zeros(len(x) * k, num_classes).scatter_(1, labels.view(-1, 1), 1.0)
        weights = (similarity / 0.07).exp()
        scores = (votes.view(len(x), k, num_classes) * weights[..., None]).sum(dim=1)
        right += (scores.sort(dim=1, descending=True).indices[:, 0] == y).sum().item()
    return 100 * right / len(test)
