# What pipelines.launch reads, and for people the launcher's account and the dataset bucket.

output "project" {
  description = "Project that the jobs run in."
  value       = var.project
}

output "region" {
  description = "Region of the jobs."
  value       = var.region
}

output "subnetwork" {
  description = "Subnetwork of the workers."
  value       = local.subnetwork
}

output "service_account_email" {
  description = "Account that the workers run as."
  value       = google_service_account.worker.email
}

output "launcher_service_account" {
  description = "Account that starts and watches the jobs: gcloud auth application-default login --impersonate-service-account takes it."
  value       = google_service_account.launcher.email
}

output "staging_location" {
  description = "Where a job's own files go."
  value       = "${local.staging}/staging"
}

output "temp_location" {
  description = "Where a job's temporary files go."
  value       = "${local.staging}/temp"
}

output "compilation_cache" {
  description = "Where the workers keep compiled programs for each other and for the next job."
  value       = local.compilation_cache
}

output "dataset" {
  description = "Bucket of prompts, models and images."
  value       = "gs://${google_storage_bucket.dataset.name}"
}

output "dataflow_kms_key" {
  description = "Key that jobs are encrypted with; null for Google's own."
  value       = local.kms_key
}

output "sdk_container_image" {
  description = "Image of launcher and workers, by Dockerfile target: build and push these."
  value       = local.images
}

output "template_file_gcs_location" {
  description = "Flex Template spec, by Dockerfile target."
  value = {
    for target, object in google_storage_bucket_object.template : target => "${local.staging}/${object.name}"
  }
}
