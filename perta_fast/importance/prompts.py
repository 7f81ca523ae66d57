"""Whether two importances were estimated with the same prompts, without which they cannot be weighed fairly."""

from perta_fast.data.chat import Told, shown
from perta_fast.errors import InputError


def check_system_prompts(forget: Told, retain: Told) -> None:
    """Raise InputError if both data sets went through a chat template, with different system prompts.

    Of texts, tokens and importances of builds that did not record it, nothing is known, and all fit.
    """
    if not (forget.chat_template and retain.chat_template) or forget.system_prompt == retain.system_prompt:
        return
    prompts = ["none" if told.system_prompt is None else shown(told.system_prompt) for told in (forget, retain)]
    raise InputError(
        f"the system prompt of the forget importance is {prompts[0]}, that of the retain importance {prompts[1]}: "
        "weights of the two would tell the prompts apart, not the data; estimate one of them again with the "
        "‹system_prompt› of the other, or without one"
    )


def different_dates(forget: Told, retain: Told) -> str:
    """A warning if the chat template was told another date with one data set than with the other; else ""."""
    dates = (forget.date, retain.date)
    if None not in dates:
        differ = forget.day != retain.day
    else:  # rows that did not ask fit any date of a clock, but not a --date-string
        given = forget.date_string or retain.date_string
        differ = forget.chat_template and retain.chat_template and given is not None
    if not differ:
        return ""
    other, again = ("retain", dates[0]) if dates[0] is not None else ("forget", dates[1])
    return (
        f"the chat template was told different dates: {dates[0] or 'none'} for the forget importance, "
        f"{dates[1] or 'none'} for the retain importance; to have the same prompts, estimate the {other} importance "
        f"again with --date-string '{again}'"
    )
