{{/*
The controller's configuration file: controller.config plus what only the chart knows.
A null in the values removes a key on its way here; the two SLOs must be said, so it is put back.
*/}}
{{- define "sglang-alloc.controllerConfig" -}}
{{- $config := deepCopy .Values.controller.config }}
{{- $slo := $config.slo }}
{{- range $key, $buckets := dict "ttft_seconds" "ttftBucketsSeconds" "itl_seconds" "itlBucketsSeconds" }}
{{- if hasKey $slo $key }}
{{- include "sglang-alloc.requireEdge" (dict "slo" $key "value" (get $slo $key) "name" $buckets "edges" (get $.Values.sglang $buckets)) }}
{{- else }}
{{- $_ := set $slo $key nil }}
{{- end }}
{{- end }}
{{- $source := default dict $config.source }}
{{- if not $source.url }}
{{- $_ := set $source "url" (printf "http://127.0.0.1:%v" .Values.sglang.port) }}
{{- end }}
{{- $_ := set $config "source" $source }}
{{- $_ := set $config "table" (include "sglang-alloc.tablePath" .) }}
{{- $_ := set $config "http" (dict "host" "0.0.0.0" "port" .Values.controller.metricsPort) }}
{{- if .Values.controller.controlTokenSecret.name }}
{{- if (default dict $config.control).token_file }}
{{- fail "controller.controlTokenSecret.name and controller.config.control.token_file are both set: keep one" }}
{{- end }}
{{- $_ := set $config "control" (dict "token_file" (printf "%s/token" (include "sglang-alloc.controlTokenFolder" .))) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{/* The sections that a running controller cannot take; it follows changes of all others by itself. */}}
{{- define "sglang-alloc.whatNeedsARestart" -}}
{{- pick (include "sglang-alloc.controllerConfig" . | fromYaml) "table" "source" "http" "control" "kill_switch" "decision_log" | toYaml }}
{{- end }}
