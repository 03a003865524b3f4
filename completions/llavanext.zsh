#compdef llavanext

_llavanext_completion() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _LLAVANEXT_COMPLETE=complete_zsh llavanext)
}

compdef _llavanext_completion llavanext

