"""Pure functions on tensors and models: they know torch, and neither Lightning nor files.

Each callback is a thin layer over these; all of them can be used without a Trainer.
"""

from lightning_interp.functional.class_images import class_evidence, maximize_class
from lightning_interp.functional.dead import dead_filters, dormancy_scores
from lightning_interp.functional.embeddings import embed
from lightning_interp.functional.faithfulness import concentration, faithfulness
from lightning_interp.functional.filters import filter_movement, filter_smoothness, variance_entropy
from lightning_interp.functional.influence import (
    HeadInfluence,
    head_influence,
    perturbation_direction,
    self_influence,
)
from lightning_interp.functional.integrated_gradients import integrated_gradients
from lightning_interp.functional.mislabeled import knn_disagreement, label_votes, rank_suspects, suspicion
from lightning_interp.functional.occlusion import occlusion, occlusion_map
from lightning_interp.functional.patches import PatchRanking, project_patches, rank_patches
from lightning_interp.functional.projection import Projection, displacement, project_pca, project_tsne, project_umap
from lightning_interp.functional.receptive_field import ReceptiveField, receptive_field
from lightning_interp.functional.saliency import saliency_map, saliency_maps
from lightning_interp.functional.separation import neighbor_votes, separation
from lightning_interp.functional.softmax_head import SoftmaxHead, fit_softmax_head
from lightning_interp.functional.sparsity import sparsity
from lightning_interp.functional.updates import step_ratio, update_ratio
from lightning_interp.functional.wrong_labels import wrong_label_share

__all__ = [
    "HeadInfluence",
    "PatchRanking",
    "Projection",
    "ReceptiveField",
    "SoftmaxHead",
    "class_evidence",
    "concentration",
    "dead_filters",
    "displacement",
    "dormancy_scores",
    "embed",
    "faithfulness",
    "filter_movement",
    "filter_smoothness",
    "fit_softmax_head",
    "head_influence",
    "integrated_gradients",
    "knn_disagreement",
    "label_votes",
    "maximize_class",
    "neighbor_votes",
    "occlusion",
    "occlusion_map",
    "perturbation_direction",
    "project_patches",
    "project_pca",
    "project_tsne",
    "project_umap",
    "rank_patches",
    "rank_suspects",
    "receptive_field",
    "saliency_map",
    "saliency_maps",
    "self_influence",
    "separation",
    "sparsity",
    "step_ratio",
    "suspicion",
    "update_ratio",
    "variance_entropy",
    "wrong_label_share",
]
