{{- define "mirai.mounts" -}}
- {name: config, mountPath: /etc/mirai/config, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if and (ne .Values.model.source "embedded") (ne .Values.model.source "kserve") }}
- name: model
  mountPath: {{ include "mirai.modelRoot" . }}
  readOnly: true
  {{- if and (eq .Values.model.source "pvc") .Values.model.pvc.subPath }}
  subPath: {{ .Values.model.pvc.subPath }}
  {{- end }}
{{- end }}
- {name: ledger, mountPath: /var/lib/mirai}
{{- if gt (int .Values.resources.gpu) 1 }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- range $name, $_ := include "mirai.files" . | fromYaml }}
- {name: {{ $name }}, mountPath: /etc/mirai/{{ $name }}, readOnly: true}
{{- end }}
{{- range .Values.mounts }}
- {name: {{ .name }}, mountPath: {{ .mountPath }}, readOnly: true}
{{- end }}
{{- end }}

{{/* Existing Secrets and ConfigMaps that other values name; each is mounted at /etc/mirai/NAME. */}}
{{- define "mirai.files" -}}
{{- with .Values.auth.existingSecret }}
auth: {secret: {secretName: {{ . }}}}
{{- end }}
{{- with .Values.identity.applications.configMap }}
applications: {configMap: {name: {{ . }}}}
{{- end }}
{{- with .Values.identity.pepper.existingSecret }}
pepper: {secret: {secretName: {{ . }}}}
{{- end }}
{{- with .Values.identity.userKey.existingSecret }}
user-key: {secret: {secretName: {{ . }}}}
{{- end }}
{{- with .Values.ledger.chainKey.existingSecret }}
chain-key: {secret: {secretName: {{ . }}}}
{{- end }}
{{- with .Values.tls.existingSecret }}
tls: {secret: {secretName: {{ . }}}}
{{- end }}
{{- with .Values.tls.clientCa.configMap }}
client-ca: {configMap: {name: {{ . }}}}
{{- end }}
{{- with .Values.caBundle.configMap }}
ca: {configMap: {name: {{ . }}}}
{{- end }}
{{- end }}

{{- define "mirai.volumes" -}}
- name: config
  configMap:
    name: {{ include "mirai.configName" . }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.resources.tmp }}
{{- with .Values.model }}
{{- if eq .source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .pvc.claimName }}
    readOnly: true
{{- else if eq .source "image" }}
- name: model
  image: {{ toYaml .image | nindent 4 }}
{{- else if eq .source "fetch" }}
- name: model
  {{- if .fetch.claimName }}
  persistentVolumeClaim:
    claimName: {{ .fetch.claimName }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ ceil (mulf .sizeGiB 1126.4) }}Mi
  {{- end }}
- name: checksums
  configMap:
    name: {{ include "mirai.checksumsName" $ }}
{{- end }}
{{- end }}
{{- if ne (include "mirai.kind" .) "StatefulSet" }}
- name: ledger
  emptyDir:
    sizeLimit: {{ .Values.ledger.size }}
{{- end }}
{{- if gt (int .Values.resources.gpu) 1 }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.resources.sharedMemory }}
{{- end }}
{{- range $name, $source := include "mirai.files" . | fromYaml }}
- name: {{ $name }}
  {{- toYaml $source | nindent 2 }}
{{- end }}
{{- range .Values.mounts }}
- name: {{ .name }}
  {{- if .secret }}
  secret: {secretName: {{ .secret }}}
  {{- else }}
  configMap: {name: {{ .configMap }}}
  {{- end }}
{{- end }}
{{- end }}
