{{/* The server's configuration: the user's values over what follows from the rest of the chart's. */}}
{{- define "mirai.config" -}}
{{- $c := dict "server" dict "model" dict }}
{{- if .Values.auth.existingSecret }}{{ $_ := set $c.server "api_key_file" (printf "/etc/mirai/auth/%s" .Values.auth.key) }}{{ end }}
{{- if .Values.auth.insecure }}{{ $_ := set $c.server "insecure_no_auth" true }}{{ end }}
{{- with .Values.tls.existingSecret }}
{{- $_ := set $c.server "tls" (dict "certfile" "/etc/mirai/tls/tls.crt" "keyfile" "/etc/mirai/tls/tls.key") }}
{{- with $.Values.tls.clientCa }}{{ if .configMap }}{{ $_ := set $c.server.tls "ca_certs" (printf "/etc/mirai/client-ca/%s" .key) }}{{ end }}{{ end }}
{{- end }}
{{- with .Values.identity }}
{{- $identity := dict }}
{{- if .applications.configMap }}{{ $_ := set $identity "applications_file" (printf "/etc/mirai/applications/%s" .applications.key) }}{{ end }}
{{- if .pepper.existingSecret }}{{ $_ := set $identity "pepper_file" (printf "/etc/mirai/pepper/%s" .pepper.key) }}{{ end }}
{{- if .userKey.existingSecret }}{{ $_ := set $identity "user_key_file" (printf "/etc/mirai/user-key/%s" .userKey.key) }}{{ end }}
{{- if $identity }}{{ $_ := set $c "identity" $identity }}{{ end }}
{{- end }}
{{- with .Values.ledger }}
{{- $_ := set $c "ledger" (dict "store" "sqlite:///var/lib/mirai/ledger.sqlite") }}
{{- if eq .store "postgres" }}{{ $_ := set $c "ledger" (dict "store" .url "spool" "/var/lib/mirai/spool") }}{{ end }}
{{- if .chainKey.existingSecret }}{{ $_ := set $c.ledger "chain_key_file" (printf "/etc/mirai/chain-key/%s" .chainKey.key) }}{{ end }}
{{- end }}
{{- with .Values.model.name }}{{ $_ := set $c.model "served_names" (list .) }}{{ end }}
{{- $root := include "mirai.modelRoot" . }}
{{- if $root }}{{ $_ := set $c.model "path" (trimSuffix "/" (printf "%s/%s" $root .Values.model.path)) }}{{ end }}
{{- if .Values.resources.gpu }}{{ $_ := set $c.model "device" "cuda" }}{{ $_ := set $c "engine" (dict "plan_folder" "/tmp/plans") }}{{ end }}
{{- toJson (mergeOverwrite $c (deepCopy .Values.config)) }}
{{- end }}

{{/* Where the model's volume is mounted; empty for the embedded one. */}}
{{- define "mirai.modelRoot" -}}
{{- if eq .Values.model.source "kserve" }}/mnt/models{{ else if ne .Values.model.source "embedded" }}/models{{ end }}
{{- end }}

{{/*
A map as TOML. A value's JSON is TOML, but for maps and lists of maps, which become tables. Arguments: path, map.
What the clusters' rules forbid in a ConfigMap by its name (a path, never the secret) goes by the environment.
*/}}
{{- define "mirai.toml" -}}
{{- $path := index . 0 }}{{ $map := index . 1 }}
{{- range $key, $value := $map }}
{{- if and (not (kindIs "map" $value)) (not (include "mirai.isTables" $value)) (not (contains "password" $key)) }}
{{ $key }} = {{ toJson $value }}{{ end }}{{ end }}
{{- range $key, $value := $map }}
{{- $inner := ternary (printf "%s.%s" $path $key) $key (ne $path "") }}
{{- if kindIs "map" $value }}

[{{ $inner }}]{{ include "mirai.toml" (list $inner $value) }}
{{- else if include "mirai.isTables" $value }}{{ range $value }}

[[{{ $inner }}]]{{ include "mirai.toml" (list $inner .) }}{{ end }}{{ end }}{{ end }}
{{- end }}

{{- define "mirai.isTables" -}}
{{- if kindIs "slice" . }}{{ if . }}{{ if kindIs "map" (first .) }}true{{ end }}{{ end }}{{ end }}
{{- end }}

{{- define "mirai.configToml" -}}
{{ include "mirai.toml" (list "" (include "mirai.config" . | fromJson)) | trim }}
{{- end }}

{{- define "mirai.sha256sums" -}}
{{- range $file, $sum := .Values.model.fetch.checksums }}{{ $sum }}  {{ $file }}
{{ end }}
{{- end }}

{{/* Names carry a hash of the content: a change is a new ConfigMap and a new pod template, never an edit. */}}
{{- define "mirai.configName" -}}
{{ .Release.Name }}-{{ include "mirai.configToml" . | sha256sum | trunc 10 }}
{{- end }}
{{- define "mirai.checksumsName" -}}
{{ .Release.Name }}-sums-{{ include "mirai.sha256sums" . | sha256sum | trunc 10 }}
{{- end }}

{{- define "mirai.scheme" -}}
{{ ternary "HTTPS" "HTTP" (hasKey (include "mirai.config" . | fromJson).server "tls") }}
{{- end }}

{{- define "mirai.adminPort" -}}
{{- with ((include "mirai.config" . | fromJson).identity | default dict).admin_listen }}{{ regexFind "[0-9]+$" . }}{{ end }}
{{- end }}

{{- define "mirai.metricsPort" -}}
{{- with (include "mirai.config" . | fromJson).server.metrics_listen }}{{ regexFind "[0-9]+$" . }}{{ end }}
{{- end }}

{{- define "mirai.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{/* A file on a claim belongs to one pod with a name of its own. */}}
{{- define "mirai.kind" -}}
{{- $claim := and (eq .Values.ledger.store "sqlite") (not .Values.ledger.ephemeral) }}
{{- if ne .Values.kind "auto" }}{{ .Values.kind }}{{ else if $claim }}StatefulSet{{ else }}Deployment{{ end }}
{{- end }}

{{/* Seconds that starting may take: twice the time to read the weights, and the warm-up. */}}
{{- define "mirai.startupSeconds" -}}
{{ ceil (addf .Values.model.warmupSeconds (divf (mulf .Values.model.sizeGiB 2048) .Values.model.readMiBPerSecond)) }}
{{- end }}

{{- define "mirai.selector" -}}
app.kubernetes.io/name: mirai
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "mirai.labels" -}}
{{ include "mirai.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app: {{ .Values.labels.app | default .Release.Name | quote }}
env: {{ .Values.labels.env }}
tier: {{ .Values.labels.tier }}
{{- with .Values.labels.extra }}
{{ toYaml . }}
{{- end }}
{{- end }}
