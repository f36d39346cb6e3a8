"""From files to packed batches.

    data file           open_source      sources.py      json_records.py, tables.py (table.py)
      records           as_llava         forms.py        of other forms, in LLaVA's form
        |               read_samples     samples.py      bytes in memory, parsed lazily (mix.py)
      Sample            checked_turns    turns.py        speakers in turn, images in their places
        |               encode           dataset.py      checked; text by templates.py, segments.py
        |               Pictures.find    pictures.py     in folders, and archives.py (archive.py)
      EncodedSample     load_pixels      images.py       uint8, resized as CLIP does
        |               check_samples    check.py        all of this once, before training
        v
      micro-batches     micro_batches    packing.py      which samples share a row
      PackedBatch       pack_samples     packing.py      one row of tokens, no padding
      Step              StepLoader       loader.py       one global batch, loaded ahead (workers.py)

Without worker processes, memo.py keeps samples and pixels for the next epoch.

For studies, controls/ makes other records of a file's (with captions.py and lengths.py), subsets.py
takes parts of them. preview.py and figure.py show people the result, and report.py what is in the
file (facts.py): survey.py gathers it during the check, overlap.py finds evaluation questions.
chat_template.py writes a template as Jinja. parquet_footer.py belongs to table.py.
"""
