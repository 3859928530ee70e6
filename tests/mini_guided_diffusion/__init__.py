"""A package of guided-diffusion's shape, our own transcription of the papers: what `patch` is tried on.

unet: arXiv 2105.05233 (attention); nn: arXiv 2006.11239 (time embedding); gaussian_diffusion: arXiv 2006.11239 and
2010.02502 for a network that predicts the noise; respace: arXiv 2102.09672. As in some forks, the loop takes one
argument more than the original's, and there is a sampler that the original has not.
"""
