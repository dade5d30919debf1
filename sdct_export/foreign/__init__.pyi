from .file import read_graph as read_graph
from .match import Match as Match
from .match import match_weights as match_weights
from .place import place_sites as place_sites
from .weights import Product as Product
from .weights import find_products as find_products
