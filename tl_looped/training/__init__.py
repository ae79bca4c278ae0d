"""Training of the models that come with the package: `python -m tl_looped.training looped-hops --out FOLDER`."""

from tl_looped.training.evaluate import accuracy_table as accuracy_table
from tl_looped.training.recipes import RECIPES as RECIPES
from tl_looped.training.recipes import Recipe as Recipe
from tl_looped.training.trainer import train as train
