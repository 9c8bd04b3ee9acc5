# An optional job that an apply starts, or that a schedule starts. To the provider a job that has ended is gone, so each
# apply after that starts it again. Another run over the same output makes only what is missing there; a scheduled one is
# refused by Dataflow while the last one still runs, as it has the same name.

locals {
  # In a set, so that every expression below is only evaluated where there is a job.
  jobs = {
    for job in var.job == null ? [] : [var.job] : job.name => merge(job, {
      experiments = concat(
        local.environments[job.target].additionalExperiments,
        ["worker_accelerator=${job.accelerator}"],
      )
      # What pipelines.launch and its presets pass, for the job's own parameters to overrule.
      parameters = merge(
        { compilation_cache = local.compilation_cache, number_of_worker_harness_threads = "4" },
        job.parameters,
        { prompts = job.prompts, output = job.output, sdk_location = "container" },
      )
      template = "gs://${google_storage_bucket.staging.name}/${google_storage_bucket_object.template[job.target].name}"
    })
  }
}

resource "google_dataflow_flex_template_job" "this" {
  for_each = { for name, job in local.jobs : name => job if job.schedule == null }
  provider = google-beta

  project                 = var.project
  name                    = each.key
  region                  = var.region
  container_spec_gcs_path = each.value.template
  machine_type            = each.value.machine_type
  num_workers             = 1
  max_workers             = each.value.max_workers
  additional_experiments  = each.value.experiments
  ip_configuration        = "WORKER_IP_PRIVATE"
  kms_key_name            = local.kms_key
  sdk_container_image     = local.images[each.value.target]
  service_account_email   = google_service_account.worker.email
  staging_location        = "${local.staging}/staging"
  temp_location           = "${local.staging}/temp"
  subnetwork              = local.subnetwork
  labels                  = local.labels
  on_delete               = "cancel"

  # The resource has no argument for these two, so they go to the pipeline's own command line.
  parameters = merge(each.value.parameters, {
    worker_zone  = each.value.zone
    disk_size_gb = tostring(each.value.disk_size_gb)
  })

  depends_on = [
    google_artifact_registry_repository_iam_member.worker,
    google_project_iam_member.this,
    google_storage_bucket_iam_binding.dataset,
    google_storage_bucket_iam_binding.staging,
    google_storage_bucket_iam_binding.worker,
  ]
}

resource "google_cloud_scheduler_job" "this" {
  for_each = { for name, job in local.jobs : name => job if job.schedule != null }

  project     = var.project
  region      = var.region
  name        = each.key
  description = "Starts the Flex Template job ${each.key}"
  schedule    = each.value.schedule
  time_zone   = each.value.time_zone

  http_target {
    http_method = "POST"
    uri         = "https://dataflow.googleapis.com/v1b3/projects/${var.project}/locations/${var.region}/flexTemplates:launch"
    headers     = { "Content-Type" = "application/json" }

    body = base64encode(jsonencode({
      launchParameter = {
        jobName              = each.key
        containerSpecGcsPath = each.value.template
        parameters           = each.value.parameters
        environment = merge(
          local.environments[each.value.target],
          {
            additionalExperiments = each.value.experiments
            additionalUserLabels  = local.labels
            diskSizeGb            = each.value.disk_size_gb
            machineType           = each.value.machine_type
            maxWorkers            = each.value.max_workers
            numWorkers            = 1
            workerZone            = each.value.zone
          },
        )
      }
    }))

    oauth_token {
      service_account_email = google_service_account.launcher.email
      scope                 = "https://www.googleapis.com/auth/cloud-platform"
    }
  }

  # A second try after a lost answer finds the name taken and starts nothing.
  retry_config {
    retry_count = 3
  }

  depends_on = [google_project_service.this, google_project_iam_member.this]
}
