"""Quantized checkpoints as they lie on disk: formats, readers, and what any folder holds.

- `formats`: how a quantized module is stored, a file per format
- `readers`: what each loader makes of a folder, a file per reader
- `inspection`: what a folder holds, judged by its tensors
- `dense_modules`, `dequantize`: our own reader, which shares no code with the formats that write
"""
