"""`moec sweep`: a grid of small decoders trained on your text, one row a run, for `moec fit`.

| file | holds |
|---|---|
| `grid` | which runs: shapes, granularities, lengths, seeds; what is impossible |
| `text` | files to bytes, training and validation, batches |
| `train` | the model, the learning rate, one step, the loss that is reported |
| `runner` | trunks and their decay branches, checkpoints, rows; what survives a kill |
| `results` | the folder of a sweep: manifest, rows, tables |
"""
