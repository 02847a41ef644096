"""In which precision the runs of an experiment add gradients up, as its ``flags`` say."""

from dataclasses import fields

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.options.flags import FlagParser
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.words import switch


def flags(experiment: ExperimentConfig) -> GradientFlags:
    """What the planner is to know of them.

    Raises:
        UserError: for one of these flags without a value.
    """
    parser = FlagParser()
    for field in fields(GradientFlags):
        named = switch(field.name)
        if isinstance(field.default, bool):
            parser.add_argument(*named, action="store_true")
        else:
            parser.add_argument(*named, default=field.default)
    return GradientFlags(**vars(parser.parse_known_args(experiment.flags)[0]))
