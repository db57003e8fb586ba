"""The loss is the model's own, whatever the model predicts."""

import pytest
import torch

from sa_inject.trainer.objective import prediction_loss

B, C, H, W = 3, 4, 5, 6


def noised(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """latent, noise and a raw output (b, c, h, w), sigma (b, 1, 1, 1)"""
    generator = torch.Generator().manual_seed(seed)
    latent, noise, output = (torch.randn(B, C, H, W, generator=generator) for _ in range(3))
    return latent, noise, output, torch.tensor([0.1, 1.0, 9.0]).view(B, 1, 1, 1)


def test_loss_is_the_epsilon_loss_of_an_epsilon_model():
    latent, noise, output, sigma = noised()
    denoised = latent + sigma * noise - sigma * output
    expected = (output - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(prediction_loss(denoised, latent, -sigma), expected, rtol=1e-4, atol=0)


def test_loss_is_the_v_loss_of_a_v_model():
    latent, noise, output, sigma = noised()
    root = (sigma.square() + 1).sqrt()
    x = latent + sigma * noise
    denoised = x / root.square() - output * sigma / root
    v = (noise - sigma * latent) / root  # the target of a v model at unit variance
    expected = (output - v).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(prediction_loss(denoised, latent, -sigma / root), expected, rtol=1e-4, atol=0)


def test_rows_are_apart():
    latent, _, output, sigma = noised()
    loss = prediction_loss(output, latent, sigma)
    assert loss.shape == (B,)
    for row in range(B):
        alone = prediction_loss(output[row : row + 1], latent[row : row + 1], sigma[row : row + 1])
        torch.testing.assert_close(loss[row], alone[0])


def test_only_what_the_mask_shows_counts():
    latent, _, output, sigma = noised()
    mask = torch.zeros(B, 1, H, W)
    mask[:, :, 1:3, 2:] = 1
    expected = prediction_loss(output[:, :, 1:3, 2:], latent[:, :, 1:3, 2:], sigma)
    torch.testing.assert_close(prediction_loss(output, latent, sigma, mask), expected)
    torch.testing.assert_close(prediction_loss(output, latent, sigma, mask * 0.5), expected)  # a mean, not a sum
    torch.testing.assert_close(
        prediction_loss(output, latent, sigma, torch.ones_like(mask)), prediction_loss(output, latent, sigma)
    )


def test_soft_mask_weighs():
    latent = torch.zeros(1, 1, 1, 2)
    denoised = torch.tensor([[[[1.0, 3.0]]]])
    mask = torch.tensor([[[[1.0, 0.25]]]])
    loss = prediction_loss(denoised, latent, torch.ones(1, 1, 1, 1), mask)
    torch.testing.assert_close(loss, torch.tensor([(1 * 1 + 0.25 * 9) / 1.25]))


def test_empty_mask_gives_no_loss_and_no_nan():
    latent, _, output, sigma = noised()
    assert prediction_loss(output, latent, sigma, torch.zeros(B, 1, H, W)).tolist() == [0.0] * B


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_in_any_precision(dtype):
    latent = torch.zeros(1, C, H, W, dtype=dtype)
    denoised = torch.full((1, C, H, W), 300.0, dtype=dtype)  # its square is beyond half precision
    loss = prediction_loss(denoised, latent, torch.ones(1, 1, 1, 1))
    assert loss.dtype == torch.float32 and loss.item() == denoised.float().square().mean().item()
