"""Every inference form on CUDA, simulated or real: what the CPU gives, on the device."""

from __future__ import annotations

import pytest
import torch

from sae_research.saes import SparseAutoencoder, encode_each
from tests.helpers.cuda import DEVICES, covered, cuda
from tests.helpers.random_saes import make_sae, random_activations


def decoded(sae: SparseAutoencoder, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, reconstruction), masked; checked to lie on the device."""
    x = random_activations().to(device)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
    mask[:, 0] = mask[1, 2:4] = False
    sae = sae.to(device)
    z = sae.encode(x, mask)
    found = sae.decode(z)
    together = dict(encode_each({"a": sae, "b": sae}, x, mask))
    for tensor in (z, found, *together.values()):
        assert tensor.device.type == device
    torch.testing.assert_close(together["a"].cpu(), z.cpu(), rtol=1e-4, atol=1e-4)
    return z.cpu(), found.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", covered("encoder"))
def test_an_encoder_gives_what_it_gives_on_the_cpu(form: str, device: str) -> None:
    z, found = decoded(make_sae(form), "cpu")
    with cuda(device):
        there = decoded(make_sae(form), "cuda")
    torch.testing.assert_close(there[0], z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there[1], found, rtol=1e-3, atol=1e-3)
