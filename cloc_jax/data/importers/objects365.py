"""Objects365 v2's annotation files → a region-text data set.

COCO's layout; an image's `file_name` is 'images/v2/patch8/objects365_v2_00420917.jpg', and the archives unpack to
'patch8/…', so that a file is looked for at every end part of its name.
Source: Shao et al., *Objects365: A Large-scale, High-quality Dataset for Object Detection*, 2019; objects365.org.
"""
import dataclasses

from cloc_jax.data.importers import coco


@dataclasses.dataclass
class Objects365(coco.Coco):
  """Objects365's importer: sources as for COCO (`zhiyuan_objv2_train.json`); group boxes (`iscrowd`) are left out."""
  name: str = 'objects365'
  description: str = 'Objects365 v2: photos with boxes of 365 categories.'

  label = 'objects365'
  search = True
  note_crowds = False  # there are hundreds of thousands
