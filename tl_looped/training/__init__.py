"""Training of the models that come with the package: `python -m tl_looped.training looped-hops --out FOLDER`.

`dataclasses.replace` makes another recipe of one that is there.
"""

from tl_looped.training.evaluate import accuracy_table as accuracy_table
from tl_looped.training.recipes import RECIPES as RECIPES
from tl_looped.training.text import TEXT_RECIPES as TEXT_RECIPES
from tl_looped.training.text import train_on_text as train_on_text
from tl_looped.training.trainer import train as train
