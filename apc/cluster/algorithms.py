"""The clustering algorithms by the name that `cluster.algorithm` gives them."""

from apc.cluster.apc_paper import PaperClustering
from apc.cluster.hamming import BRBKMeans, KMajority
from apc.cluster.lloyd import ClusteringModule

ALGORITHMS = {"lloyd": ClusteringModule, "apc-paper": PaperClustering, "brb-kmeans": BRBKMeans, "k-majority": KMajority}
