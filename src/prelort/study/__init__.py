"""Studies: methods x seeds x settings, a run for each cell. A plain run is a study of one cell.

    OUT/[SETTING/][METHOD/][seed-N]   a cell's run: a level for each axis that the study lists
    OUT/study.toml                    the resolved study, where it lists any axis
    OUT/failures.json                 why cells have no result, where some failed
    OUT/results.md, *.csv, *.png      tables and pictures of all cells
    OUT/report.html                   the page

The same study again continues where it stopped: finished cells are kept, a killed one continues
from its last checkpoint, a failed one is tried again.
"""
