"""What is random, by (seed, epoch, sample): order, crop draws, masks."""

from ibeton.pipeline.sampling.draws import ViewSpec as ViewSpec
from ibeton.pipeline.sampling.draws import draw_batch as draw_batch
from ibeton.pipeline.sampling.draws import draw_views as draw_views
from ibeton.pipeline.sampling.draws import spec_table as spec_table
from ibeton.pipeline.sampling.draws import stack_shape as stack_shape
from ibeton.pipeline.sampling.masks import KeyDraws as KeyDraws
from ibeton.pipeline.sampling.masks import MaskConfig as MaskConfig
from ibeton.pipeline.sampling.masks import draw_mask_reference as draw_mask_reference
from ibeton.pipeline.sampling.masks import draw_masks as draw_masks
