"""The properties reject each of the mistakes in `wrong_data`: a property that cannot fail proves nothing."""

import pytest
from data_properties import (
    answers_are_labeled,
    held_out_is_unseen,
    order_is_a_stream_of_epochs,
    packing_preserves,
    padding_preserves,
)
from hypothesis import Phase, settings
from small_tokenizer import SmallTokenizer, backend
from wrong_data import Labels, Order, Packing, Padding, Split

from minift.data.templates import CHATML

ANY_PAIRS = SmallTokenizer(backend(by_words=False), CHATML)  # byte pairs merge over line breaks too
PROPERTIES = {
    Labels: lambda wrong: answers_are_labeled(wrong, ANY_PAIRS),
    Padding: padding_preserves,
    Packing: packing_preserves,
    Order: order_is_a_stream_of_epochs,
    Split: held_out_is_unseen,
}
WRONG = [(kind, name) for kind in PROPERTIES for name in vars(kind) if not name.startswith("_")]


@pytest.mark.parametrize(("kind", "name"), WRONG, ids=[f"{kind.__name__}-{name}" for kind, name in WRONG])
def test_rejected(kind, name):
    before = settings.default
    quick = {"phases": (Phase.explicit, Phase.generate), "report_multiple_bugs": False}  # the first failure will do
    settings.register_profile("no shrinking", before, **quick)
    settings.load_profile("no shrinking")
    try:
        with pytest.raises(AssertionError):
            PROPERTIES[kind](getattr(kind, name))
    finally:
        settings.register_profile("before", before)
        settings.load_profile("before")
