"""The clustering algorithms by their names in `cluster.algorithm`."""

from apc.cluster.apc_paper import PaperClustering
from apc.cluster.hamming import BRBKMeans, KMajority
from apc.cluster.lloyd import ClusteringModule

ALGORITHMS: dict[str, type[ClusteringModule]] = {
    "lloyd": ClusteringModule,
    "apc-paper": PaperClustering,
    "brb-kmeans": BRBKMeans,
    "k-majority": KMajority,
}
