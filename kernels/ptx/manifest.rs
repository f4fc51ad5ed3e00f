// Made together with the files that it names: do not edit.
&[]
