"""The miniature text-to-image diffusion model: text encoder, UNet, pretraining and checks."""
