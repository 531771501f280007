{{/* The pod, whatever kind of object makes it. */}}
{{- define "mirai.podTemplate" -}}
metadata:
  labels:
    {{- include "mirai.labels" . | nindent 4 }}
    {{- with .Values.inferencePool.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    mirai/config: {{ include "mirai.configName" . }}
    {{- with .Values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  {{- include "mirai.podSpec" . | nindent 2 }}
{{- end }}

{{- define "mirai.podSpec" -}}
{{- $config := include "mirai.config" . | fromJson -}}
enableServiceLinks: false
automountServiceAccountToken: false
{{- with .Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- if .Values.topologySpread }}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "mirai.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
# The drain's two parts, and ten seconds to end in.
terminationGracePeriodSeconds: {{ ceil (addf $config.server.timeouts.drain_delay_seconds $config.server.timeouts.shutdown_seconds 10) }}
{{- if eq .Values.podSecurity "restricted" }}
securityContext:
  runAsNonRoot: true
  fsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- end }}
{{- if eq .Values.model.source "fetch" }}
initContainers:
  - {{ include "mirai.fetchContainer" . | nindent 4 | trim }}
{{- end }}
containers:
  - {{ include "mirai.container" . | nindent 4 | trim }}
volumes:
  {{- include "mirai.volumes" . | nindent 2 }}
{{- end }}

{{- define "mirai.container" -}}
{{- $config := include "mirai.config" . | fromJson -}}
name: {{ ternary "kserve-container" "mirai" (eq .Values.kind "ServingRuntime") }}
image: {{ include "mirai.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [serve, --config, /etc/mirai/config/mirai.toml]
ports:
  - name: http
    containerPort: {{ $config.server.port }}
  {{- with include "mirai.metricsPort" . }}
  - name: metrics
    containerPort: {{ . }}
  {{- end }}
  {{- with include "mirai.adminPort" . }}
  - name: admin
    containerPort: {{ . }}
  {{- end }}
{{- include "mirai.env" . }}
{{- include "mirai.probes" . }}
resources:
  {{- range list "requests" "limits" }}
  {{ . }}:
    cpu: {{ $.Values.resources.cpu | quote }}
    memory: {{ $.Values.resources.memory }}
    ephemeral-storage: {{ $.Values.resources.ephemeralStorage }}
    {{- with $.Values.resources.gpu }}
    {{ $.Values.resources.gpuResource }}: {{ . }}
    {{- end }}
  {{- end }}
{{- include "mirai.securityContext" . }}
volumeMounts:
  {{- include "mirai.mounts" . | nindent 2 }}
{{- end }}

{{- define "mirai.env" -}}
{{- $ledger := (include "mirai.config" . | fromJson).ledger | default dict }}
{{- if or .Values.env .Values.caBundle.configMap .Values.ledger.existingSecret $ledger.password_file }}
env:
  {{- with .Values.ledger }}{{ if .existingSecret }}
  - name: MIRAI_LEDGER_PASSWORD
    valueFrom:
      secretKeyRef:
        name: {{ .existingSecret }}
        key: {{ .key }}
  {{- end }}{{ end }}
  {{- with $ledger.password_file }}
  - name: MIRAI__LEDGER__PASSWORD_FILE
    value: {{ . | quote }}
  {{- end }}
  {{- with .Values.caBundle }}{{ if .configMap }}
  - name: SSL_CERT_FILE
    value: /etc/mirai/ca/{{ .key }}
  {{- end }}{{ end }}
  {{- range .Values.env }}
  - name: {{ .name }}
    {{- if .secret }}
    valueFrom:
      secretKeyRef:
        name: {{ .secret }}
        key: {{ .key }}
    {{- else }}
    value: {{ .value | quote }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* A kubelet has no client certificate: with mutual TLS it can only see that the port is open. */}}
{{- define "mirai.probes" -}}
{{- $server := (include "mirai.config" . | fromJson).server }}
{{- $mutual := and (hasKey $server "tls") (hasKey ($server.tls | default dict) "ca_certs") }}
{{- $probes := dict "startup" (dict "periodSeconds" 5 "failureThreshold" (div (add (include "mirai.startupSeconds" . | int) 4) 5))
  "live" (dict "periodSeconds" 10 "failureThreshold" 3) "ready" (dict "periodSeconds" 5 "failureThreshold" 2) }}
{{- range $name, $probe := $probes }}
{{ get (dict "startup" "startup" "live" "liveness" "ready" "readiness") $name }}Probe:
  {{- if $mutual }}
  tcpSocket:
    port: http
  {{- else }}
  httpGet:
    path: /health/{{ $name }}
    port: http
    scheme: {{ include "mirai.scheme" $ }}
  {{- end }}
  timeoutSeconds: 3
  {{- range $key, $value := $probe }}
  {{ $key }}: {{ $value }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "mirai.securityContext" -}}
{{- if eq .Values.podSecurity "restricted" }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}
{{- end }}

{{- define "mirai.fetchContainer" -}}
name: fetch
image: {{ .Values.model.fetch.image }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [sh, -euc]
args:
  - {{ .Files.Get "files/fetch.sh" | toJson }}
env:
  - name: SOURCE
    value: {{ .Values.model.fetch.source | quote }}
  - name: RCLONE_CONFIG
    value: /tmp/rclone.conf
{{- with .Values.model.fetch.existingSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
resources:
  {{- range list "requests" "limits" }}
  {{ . }}: {cpu: "1", memory: 512Mi}
  {{- end }}
{{- include "mirai.securityContext" . }}
volumeMounts:
  - {name: model, mountPath: /models}
  - {name: checksums, mountPath: /etc/mirai/checksums, readOnly: true}
  - {name: tmp, mountPath: /tmp}
{{- end }}
