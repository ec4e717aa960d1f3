"""Where the subscriber of an event listens: of train_step and sample, each base model has its own."""

from collections.abc import Mapping
from typing import Final

from knapper.catalogue.served_models import Catalogue
from knapper.state.model_record import slug
from knapper.store import Store

_OF_MODELS: Final = ("train_step", "sample")


class Subscribers:
    """`urls`: of those that serve no base model."""

    def __init__(self, store: Store, urls: Mapping[str, str]) -> None:
        self._catalogue = Catalogue(store)
        self._urls = urls

    async def url_of(self, subscriber: str, event: Mapping[str, str]) -> str:
        """Empty if no model is served. `event`: its attributes. Raises StoreError.

        An event of a model that nobody serves goes to an engine all the same, which says what is wrong with it.
        """
        if subscriber not in _OF_MODELS:
            return self._urls.get(subscriber, "")
        models = await self._catalogue.models()
        if not models:
            return ""
        record = {slug(each.name): each for each in models}.get(event.get("model", ""), models[0])
        return record.train_step_url if subscriber == "train_step" else record.sample_url
