"""Everything this package takes from diffusers, imported in one place.

diffusers imports torchvision behind the scenes; when torch and torchvision come from different builds that import dies
inside three libraries' machinery. Here it becomes one line that says what to reinstall.
"""

from sd_vae.errors import UserError

__all__ = [
    "Attention",
    "AttnProcessor2_0",
    "AutoencoderKLOutput",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "DiffusersAutoencoderKL",
    "apply_forward_hook",
    "get_activation",
    "register_to_config",
]


def _blames_torchvision(error: BaseException | None) -> bool:
    """Whether an import error or one that it came from names torchvision; the outermost often does not."""
    while error is not None:
        if "torchvision" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


try:
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.activations import get_activation
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
except (ImportError, RuntimeError) as error:
    if not _blames_torchvision(error):
        raise
    raise UserError(
        "torch and torchvision are not of the same build, so torchvision cannot be imported; reinstall both from one "
        "index: pip install --force-reinstall torch torchvision."
    ) from error
