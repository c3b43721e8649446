"""Makers of hostile input, one for each class of it: each writes files into a folder from a seeded generator and says
what must become of their rows.
"""

from tests.hostile import files, images, structure, text

CLASSES = [
    images.corrupt_pixels,
    images.truncated_images,
    images.zero_byte_images,
    images.decompression_bombs,
    images.bytes_that_are_no_image,
    images.odd_colour_modes,
    images.animations,
    images.several_images_a_row,
    images.image_counts_that_differ,
    text.unicode_text,
    text.special_tokens_in_text,
    text.nul_bytes,
    text.enormous_text,
    text.text_that_is_not_unicode,
    text.empty_answers,
    text.mixed_text_only_rows,
    structure.wrong_columns,
    structure.wrong_types,
    structure.conversations_without_a_turn,
    structure.wrong_roles,
    files.empty_parquet,
    files.damaged_parquet,
    files.invalid_json_lines,
    files.invalid_csv_rows,
    files.torn_json_lists,
    files.missing_files,
    files.paths_that_lead_out,
    files.tars_that_lead_out,
    files.torn_tars,
    files.broken_members,
]
