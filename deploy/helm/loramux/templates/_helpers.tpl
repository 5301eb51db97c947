{{- define "loramux.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 52 characters at most: the pods' names and the controller's hash are appended. */}}
{{- define "loramux.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "loramux.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "loramux.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "loramux.selector" -}}
app.kubernetes.io/name: {{ include "loramux.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loramux.labels" -}}
{{ include "loramux.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "loramux.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "loramux.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Also the port's name. */}}
{{- define "loramux.scheme" -}}
{{- ternary "https" "http" (not (empty .Values.tls.existingSecret)) -}}
{{- end -}}

{{/* The file of --config. JSON's strings, numbers, booleans and lists are TOML's. */}}
{{- define "loramux.config" -}}
{{- if and .Values.config.source (not (hasKey .Values.config "source-cache")) -}}
{{- fail "config.source keeps copies in the store: give config.source-cache, well below store.size" -}}
{{- end -}}
{{- $options := merge (dict "model" .Values.model.source "drain-timeout" .Values.drainTimeout) .Values.config -}}
{{- if .Values.adapters.volume -}}
{{- $_ := set $options "adapters" (list "/adapters") -}}
{{- end -}}
{{- if .Values.keys.existingSecret -}}
{{- $_ := set $options "keys" (printf "/etc/loramux-keys/%s" .Values.keys.file) -}}
{{- else if .Values.allowAnonymous -}}
{{- $_ := set $options "allow-anonymous" true -}}
{{- else -}}
{{- fail "nobody could ask: give keys.existingSecret, or allowAnonymous: true" -}}
{{- end -}}
{{- if .Values.tls.existingSecret -}}
{{- $_ := set $options "tls-cert" "/etc/loramux-tls/tls.crt" -}}
{{- $_ := set $options "tls-key" "/etc/loramux-tls/tls.key" -}}
{{- end -}}
{{- range $key, $value := $options }}
{{ $key }} = {{ $value | toJson }}
{{- end }}
{{- end -}}
